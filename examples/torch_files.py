"""Files of torch.save: read as data and never as programs, and held against what they are for.

What is refused is a ValueError or an OSError: one sentence that names the file.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from images import printable, sentence
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

EXPECTED = "tensors and plain containers of torch.save"


def read(path: Path, *, checksums: bool = False) -> object:
    """What torch.save wrote, on the CPU.

    torch does not look at the checksums that it writes; here a flipped bit is found.

    Args:
        checksums: refuse torch's format of before 2020, which has none.
    """
    where = printable(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\3\4"
        if zipped:
            _verify(path)
        elif checksums:
            raise ValueError("another kind of file, or a cut one")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # the unpickler raises errors of a dozen kinds
        # torch's own words for a file that wants to run code are how to let it.
        why = "something else" if "weights_only" in str(error) else str(error)
        raise ValueError(
            sentence(f"{where}: expected {EXPECTED}, got {type(error).__name__}: {why}")
        ) from error


def _verify(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries, which torch does not write")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("entries that are larger than the file")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two entries of one name")
        if broken := archive.testzip():
            raise ValueError(f"other bytes in {broken} than were written")


def check_state(where: str, module: nn.Module, state: object) -> None:
    """ValueError unless the state fits the module: names, shapes, kinds of numbers, and all of them finite
    once they are numbers of the module."""
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{where}: expected a state_dict, got {type(state).__name__}")
    own = module.state_dict()
    for what, names in (("has no", own.keys() - state.keys()), ("has an unknown", state.keys() - own.keys())):
        if names:
            raise ValueError(sentence(f"{where}: {what} {min(names)!r} ({len(names)} such names)"))
    for name, mine in own.items():
        if isinstance(mine, Tensor):
            problem = _unfit(mine, state[name])
            if problem:
                raise ValueError(sentence(f"{where}: expected {name!r} {problem}"))


def _unfit(mine: Tensor, given: object) -> str:
    """What is wrong with a tensor in the place of another, or ""."""
    if not isinstance(given, Tensor) or given.layout != torch.strided or given.is_quantized:
        return f"to be a dense tensor, got {type(given).__name__}"
    if not is_lazy(mine) and given.shape != mine.shape:
        return f"of shape {list(mine.shape)}, got {list(given.shape)}"
    if given.is_complex() or given.is_floating_point() != mine.is_floating_point():
        return f"of {mine.dtype}, got {given.dtype}"
    if given.is_floating_point() and not torch.isfinite(given.to(mine.dtype)).all():
        return f"to be finite as {mine.dtype}"
    return ""


def load_weights(module: nn.Module, path: Path) -> None:
    """All or nothing."""
    state = read(path)
    check_state(printable(path), module, state)
    assert isinstance(state, Mapping)
    module.load_state_dict(state)


def check_entries(where: str, state: object, kinds: Mapping[str, type]) -> None:
    """ValueError unless the state is a dict of just these entries, each of its type."""
    if not isinstance(state, dict) or state.keys() != kinds.keys():
        names = [str(name) for name in state] if isinstance(state, dict) else type(state).__name__
        raise ValueError(sentence(f"{where}: expected the entries {', '.join(kinds)}, got {names}"))
    for name, kind in kinds.items():
        if type(state[name]) is not kind and not (kind is dict and isinstance(state[name], dict)):
            raise ValueError(
                f"{where}: expected {name!r} to be of type {kind.__name__}, got {type(state[name])}"
            )


def check_optimizer(where: str, optimizer: torch.optim.Optimizer, state: Mapping[str, object]) -> None:
    """ValueError unless the state has the optimizer's groups, and its tensors the parameters' shapes."""
    check_entries(f"{where}: optimizer", state, {"state": dict, "param_groups": list})
    own, groups = optimizer.state_dict()["param_groups"], state["param_groups"]
    same = len(groups) == len(own) and all(
        isinstance(group, dict)
        and mine.keys() == group.keys()
        and all(type(mine[name]) is type(group[name]) for name in mine)
        and repr(mine["params"]) == repr(group["params"])
        for mine, group in zip(own, groups, strict=True)
    )
    if not same:
        raise ValueError(f"{where}: expected the optimizer's {len(own)} groups of parameters, got others")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for place, values in state["state"].items():
        if type(place) is not int or not 0 <= place < len(parameters) or not isinstance(values, dict):
            raise ValueError(f"{where}: expected the optimizer's state by number of parameter, got {place!r}")
        for name, value in values.items():
            problem = isinstance(value, Tensor) and value.dim() and _unfit(parameters[place], value)
            if problem:
                raise ValueError(sentence(f"{where}: expected {name!r} of parameter {place} {problem}"))
