"""Mutated files for the readers of examples/: images, IDX, weights and checkpoints."""

from __future__ import annotations

import argparse
import gzip
import io
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import finetune_faces as ff
import idx
import images
import numpy as np
import pytest
import torch
import torch_files
from fuzz.readers import run
from PIL import Image
from torch import nn

import normface_ext as nf

ROUNDS = [
    pytest.param(range(100), id="slice"),
    pytest.param(range(1000, 1500), id="more", marks=pytest.mark.slow),
    pytest.param(range(1000, 6000), id="long", marks=pytest.mark.fuzz),
]


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("kind", images.FORMATS)
def test_image(tmp_path: Path, kind: str, seeds: range) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    good = io.BytesIO()
    Image.fromarray(pixels).save(good, kind)

    def is_an_image(value: torch.Tensor, data: bytes) -> bool:
        return value.shape == (3, 16, 16) and value.dtype == torch.uint8

    def read(path: Path) -> torch.Tensor:
        return images.read_image(path, 16)

    right, refused = run(read, "face.png", good.getvalue(), seeds, tmp_path, right=is_an_image)
    assert right + refused == len(seeds) and refused > 0


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("inside", [True, False])
def test_idx(tmp_path: Path, inside: bool, seeds: range) -> None:
    """Mutations of the gzip file, whose checksum finds them; and of what is inside, which has none."""
    array = np.random.default_rng(0).integers(0, 255, (4, 5, 6), dtype=np.uint8)
    raw = bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 6]) + array.tobytes()

    def is_right(value: np.ndarray, data: bytes) -> bool:
        if not inside:
            return np.array_equal(value, array)
        sizes = data[4 : 4 + 4 * data[3]]
        return value.tobytes() == data[4 + 4 * data[3] :] and sizes == np.array(value.shape, ">i4").tobytes()

    good, wrap = (raw, gzip.compress) if inside else (gzip.compress(raw, mtime=0), bytes)
    run(idx.read, "images.gz", good, seeds, tmp_path, right=is_right, wrap=wrap)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def with_pickle(file: bytes, data: bytes) -> bytes:
    """A zip file of torch.save with another pickle in it, and the checksums that belong to it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as given, zipfile.ZipFile(out, "w") as made:
        for name in given.namelist():
            made.writestr(name, data if name.endswith("data.pkl") else given.read(name))
    return out.getvalue()


# Of numbers for which torch has no instruction.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("where", ["zip file", "pickle in it", "old format"])
def test_weights(tmp_path: Path, where: str, seeds: range) -> None:
    made, module = io.BytesIO(), network()
    stored = {
        name: torch.rand_like(value.float()).to(value.dtype) for name, value in module.state_dict().items()
    }
    torch.save(stored, made, _use_new_zipfile_serialization=where != "old format")
    file = made.getvalue()
    good, wrap = file, bytes
    if where == "pickle in it":
        with zipfile.ZipFile(made) as archive:
            good, wrap = archive.read("archive/data.pkl"), partial(with_pickle, file)

    def read(path: Path) -> dict[str, torch.Tensor]:
        before = {name: value.clone() for name, value in module.state_dict().items()}
        try:
            torch_files.load_weights(module, path)
        except (ValueError, OSError):
            assert same(before, dict(module.state_dict()))
            raise
        return dict(module.state_dict())

    def is_right(state: dict[str, torch.Tensor], data: bytes) -> bool:
        # Where no checksum says what was written, it must at least be possible.
        return same(state, stored) if where == "zip file" else all(v.isfinite().all() for v in state.values())

    run(read, "net.pt", good, seeds, tmp_path, right=is_right, wrap=wrap)


@pytest.mark.parametrize("seeds", ROUNDS)
def test_checkpoint(tmp_path: Path, seeds: range) -> None:
    options = argparse.Namespace(
        size=2, scale="auto", device="cpu", lr=0.1, head_lr=2.0, weight_decay=0.0
    )  # fmt: skip

    def training() -> ff.Training:
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        return ff.make_training(backbone, 3, options)

    first, mark = training(), {"lr": 0.1, "images": ["a/1.png"]}
    features = first.backbone(torch.rand(4, 3, 2, 2))
    first.head(features, torch.tensor([0, 1, 2, 0])).backward()
    first.optimizer.step()
    first.step, first.losses = 1, [2.5]
    first.before = {"accuracy": 0.5, "threshold": 0.1, "tar_at_far_1": 0.2}
    ff.save(first, mark, tmp_path / "good.pt")

    def parts(of: ff.Training) -> list[Any]:
        return [of.backbone.state_dict(), of.head.state_dict(), of.optimizer.state_dict(), of.step, of.losses]

    def read(path: Path) -> ff.Training:
        fresh, random = training(), torch.get_rng_state()
        before = [dict(x) if isinstance(x, dict) else x for x in parts(fresh)]
        try:
            ff.resume(fresh, mark, path)
        except SystemExit as error:
            assert same(before, parts(fresh)) and torch.equal(random, torch.get_rng_state())
            raise ValueError(str(error)) from error
        return fresh

    def is_right(value: ff.Training, data: bytes) -> bool:
        return same(parts(value), parts(first))

    right, refused = run(
        read, "checkpoint.pt", (tmp_path / "good.pt").read_bytes(), seeds, tmp_path, right=is_right
    )
    assert right + refused == len(seeds) and refused > 0
    assert isinstance(first.head, nf.NormFaceLoss)
