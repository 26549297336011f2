"""The checkpoints of finetune_faces.py: written all or nothing, read all or nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from images import printable, sentence
from torch import Tensor, nn
from torch_files import check_entries, check_optimizer, check_state, read

import normface_ext as nf


@dataclass
class Training:
    """Everything a checkpoint holds."""

    backbone: nn.Module
    head: nf.NormFaceLoss
    optimizer: torch.optim.Optimizer
    step: int = 0
    losses: list[float] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)


#: What a checkpoint consists of.
CHECKPOINT = {
    "backbone": dict, "head": dict, "optimizer": dict, "step": int, "losses": list, "before": dict,
    "rng": Tensor, "cuda_rng": list, "fingerprint": dict,
}  # fmt: skip


def save(training: Training, mark: dict[str, object], path: Path) -> None:
    """All or nothing: a crash while writing leaves the checkpoint before."""
    state = {
        "backbone": training.backbone.state_dict(),
        "head": training.head.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "step": training.step,
        "losses": training.losses,
        "before": training.before,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "fingerprint": mark,
    }
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def resume(training: Training, mark: dict[str, object], path: Path) -> None:
    """Nothing is changed before everything is read and fits."""
    if not path.exists():
        raise SystemExit(f"--resume: there is no checkpoint {path}")
    on_gpu = training.head.weight.is_cuda
    try:
        state = read(path, checksums=True)
        check_entries(printable(path), state, CHECKPOINT)
        check_mark(printable(path), mark, state["fingerprint"])
        check_checkpoint(printable(path), training, state, on_gpu)
    except (ValueError, OSError) as error:
        raise SystemExit(sentence(f"--resume: {error}")) from None
    training.backbone.load_state_dict(state["backbone"])
    training.head.load_state_dict(state["head"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.step, training.losses, training.before = state["step"], state["losses"], state["before"]
    torch.set_rng_state(state["rng"])
    if on_gpu:
        torch.cuda.set_rng_state_all(state["cuda_rng"])


def check_mark(where: str, mark: dict[str, object], given: dict[str, object]) -> None:
    for name, value in mark.items():
        if name not in given or repr(given[name]) != repr(value):  # `!=` of a tensor is no answer
            what = f"--{name.replace('_', '-')} was {given.get(name)} and is {value}"
            if name == "images":
                what = "the images differ"
            raise ValueError(sentence(f"{where} is of another run: {what}"))


def check_checkpoint(where: str, training: Training, state: dict[str, Any], on_gpu: bool) -> None:
    check_state(f"{where}: backbone", training.backbone, state["backbone"])
    check_state(f"{where}: head", training.head, state["head"])
    check_optimizer(where, training.optimizer, state["optimizer"])
    if state["step"] != len(state["losses"]) or not all(type(loss) is float for loss in state["losses"]):
        raise ValueError(f"{where}: expected a loss for each of {state['step']} steps")
    before = state["before"]
    measures = before.keys() == {"accuracy", "threshold", "tar_at_far_1"}
    if not measures or not all(type(value) is float for value in before.values()):
        raise ValueError(f"{where}: expected what was measured before training, got other measures")
    given, here = [state["rng"]], [torch.get_rng_state()]
    if on_gpu:
        given, here = given + state["cuda_rng"], here + torch.cuda.get_rng_state_all()
    if len(given) != len(here) or not all(map(_alike, given, here)):
        raise ValueError(
            f"{where}: expected the random states of the CPU and {len(here) - 1} GPUs, got others"
        )
    try:
        torch.Generator().set_state(given[0])
    except RuntimeError as error:  # of the right size, and no state
        raise ValueError(f"{where}: expected a random state of the CPU, got {error}") from None


def _alike(given: object, mine: Tensor) -> bool:
    return isinstance(given, Tensor) and given.dtype == mine.dtype and given.shape == mine.shape
