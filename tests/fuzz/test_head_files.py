"""Mutated checkpoints: read right, or refused as tests/fuzz/readers.py says."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.readers import run

import normface_ext as nf

ROUNDS = [
    pytest.param(range(150), id="slice"),
    pytest.param(range(1000, 1500), id="more", marks=pytest.mark.slow),
    pytest.param(range(1000, 6000), id="long", marks=pytest.mark.fuzz),
]
ROWS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
CONTENT = {
    "insightface": {"epoch": 1, "state_dict_softmax_fc": {"weight": ROWS}, "state_dict_backbone": {}},
    "adaface": {
        "state_dict": {"head.kernel": ROWS.T.contiguous(), "head.batch_mean": ROWS[0, :1]},
        "hyper_parameters": {"s": 64.0, "m": 0.4, "arch": "ir_50"}, "callbacks": {Path("x"): np.float64(1)},
    },
    "own": nf.NormFaceLoss(5, 12, scale=30.0, margin=nf.CosFace(0.2)).state_dict(),
}  # fmt: skip


def saved(content, legacy=False):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def load(path: Path) -> nf.formats.LoadedHead:
    return nf.load_head(path)


def sound(loaded: nf.formats.LoadedHead, data: bytes) -> bool:
    head, report = loaded
    assert head.weight.shape == (report.classes, report.features) and torch.isfinite(head.weight).all()
    assert len(str(report)) < 5000
    x = torch.ones(2, head.in_features, dtype=head.weight.dtype)
    # Cosines: a scale may be any number that a head may be made with.
    return bool(torch.isfinite(nf.functional.norm_linear(x, head.weight, 1.0)).all())


def as_torch_reads(loaded: nf.formats.LoadedHead, data: bytes) -> bool:
    """The bytes of the weight are some of the file's: nothing was made up."""
    order = loaded.head.weight if loaded.report.layout == "[C, D]" else loaded.head.weight.T
    stored = order.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return sound(loaded, data) and all(stored[i : i + 4] in data for i in range(0, len(stored), 4))


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("name", CONTENT)
def test_archives(tmp_path, name, seeds):
    """With checksums: a file that is read is the good one, or has the weight's bytes from it."""
    good = saved(CONTENT[name])
    right, refused = run(load, "head.pt", good, seeds, tmp_path, right=as_torch_reads)
    assert refused > right


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("name", CONTENT)
def test_archives_with_right_checksums(tmp_path, name, seeds):
    """The description of the tensors is what changes."""
    with zipfile.ZipFile(io.BytesIO(saved(CONTENT[name]))) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    described = next(entry for entry in entries if entry.endswith("data.pkl"))

    def wrap(data: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for entry, value in entries.items():
                archive.writestr(entry, data if entry == described else value)
        return file.getvalue()

    right, refused = run(load, "head.pt", entries[described], seeds, tmp_path, right=sound, wrap=wrap)
    assert right > 0 and refused > 0


@pytest.mark.parametrize("seeds", ROUNDS)
@pytest.mark.parametrize("name", ["insightface", "own"])
def test_files_of_before_torch_1_6(tmp_path, name, seeds):
    right, refused = run(load, "head.pt", saved(CONTENT[name], legacy=True), seeds, tmp_path, right=sound)
    assert right > 0 and refused > 0


@pytest.mark.parametrize("seeds", ROUNDS)
def test_safetensors(tmp_path, seeds):
    header = {"partial_fc.weight": {"dtype": "F32", "shape": [12, 5], "data_offsets": [0, 240]}}
    text = json.dumps(header).encode()
    good = struct.pack("<Q", len(text)) + text + ROWS.numpy().tobytes()
    right, refused = run(load, "head.safetensors", good, seeds, tmp_path, right=as_torch_reads)
    assert right > 0 and refused > 0
