"""save_head: what each library loads, by its published names and shapes, and by itself where it is there."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses
from torch import nn

import normface_ext as nf
from normface_ext.formats import FORMATS
from normface_ext.formats.save import WRITTEN

C, D = 11, 6


def features():
    return torch.randn(5, D, generator=torch.Generator().manual_seed(1))


PML = {
    "arcface": (lambda: losses.ArcFaceLoss(C, D, margin=28.6, scale=64), nf.ArcFace(np.radians(28.6)), 64.0),
    "cosface": (lambda: losses.CosFaceLoss(C, D, margin=0.35, scale=64), nf.CosFace(0.35), 64.0),
    "normalized": (lambda: losses.NormalizedSoftmaxLoss(C, D, temperature=0.05), None, 20.0),
}


@pytest.mark.parametrize("name", PML)
def test_with_pytorch_metric_learning_itself(tmp_path, name):
    make, margin, scale = PML[name]
    theirs, labels = make(), torch.arange(5)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    head, _ = nf.load_head(tmp_path / "theirs.pt", margin=margin, scale=scale)
    torch.testing.assert_close(head(features(), labels), theirs(features(), labels), rtol=1e-5, atol=1e-5)
    back, ours = make(), nf.NormFaceLoss(D, C, margin=margin, scale=scale)
    nf.save_head(ours, tmp_path / "ours.pt", "pytorch-metric-learning")
    back.load_state_dict(torch.load(tmp_path / "ours.pt"))
    torch.testing.assert_close(ours(features(), labels), back(features(), labels), rtol=1e-5, atol=1e-5)


class Theirs(nn.Module):
    """Parameters and buffers of another library's head, by name."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            if len(shape) == 2:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            else:
                self.register_buffer(name, torch.empty(shape))


#: format -> the module that loads it, and its state_dict in the file
LOADED = {
    "insightface": (lambda: Theirs(weight=(C, D)), lambda file: file["state_dict_softmax_fc"]),
    "adaface": (
        lambda: nn.ModuleDict({"head": Theirs(kernel=(D, C), t=(1,), batch_mean=(1,), batch_std=(1,))}),
        lambda file: file["state_dict"],
    ),
    "cvlface": (lambda: nn.ModuleDict({"partial_fc": Theirs(weight=(C, D))}), lambda file: file),
    "facex-zoo": (lambda: nn.ModuleDict({"head": Theirs(weight=(D, C))}), lambda file: file["state_dict"]),
    "kernel": (lambda: Theirs(kernel=(D, C)), lambda file: file),
    "pytorch-metric-learning": (lambda: losses.CosFaceLoss(C, D), lambda file: file),
    "linear": (lambda: nn.Linear(D, C, bias=False), lambda file: file),
    "normface": (lambda: nf.NormFaceLoss(D, C, scale=30.0, margin=nf.CosFace(0.1)), lambda file: file),
}  # fmt: skip


def test_every_format_is_written_but_one():
    """MagFace's trainer loads no head without its backbone."""
    assert LOADED.keys() == WRITTEN.keys() | {"normface"} == set(FORMATS) - {"magface"}


@pytest.mark.parametrize("format", LOADED)
def test_each_library_loads_what_is_saved(tmp_path, format):
    make, state = LOADED[format]
    head = nf.NormFaceLoss(D, C, scale=30.0, margin=nf.CosFace(0.1))
    (path,) = nf.save_head(head, tmp_path / "head.pt", format)
    assert [p.name for p in tmp_path.iterdir()] == ["head.pt"] and path == tmp_path / "head.pt"
    file = torch.load(path, weights_only=True)
    module = make()
    module.load_state_dict(state(file), strict=True)
    (weight,) = (p for p in module.parameters() if p.dim() == 2)
    assert torch.equal(weight if weight.shape == (C, D) else weight.T, head.weight)
    loaded = nf.load_head(path, format)
    assert torch.equal(loaded.head.weight, head.weight)
    assert loaded.report.format == format


def test_the_default_keeps_scale_and_margin(tmp_path):
    head = nf.NormFaceLoss(D, C, scale=30.0, margin=nf.CombinedMargin(1.1, 0.2, 0.1))
    loaded, _ = nf.load_head(*nf.save_head(head, tmp_path / "head.pt"))
    assert loaded.scale == 30 and loaded.margin == head.margin and torch.equal(loaded.weight, head.weight)


@pytest.mark.parametrize("format", ["normface", "cvlface", "pytorch-metric-learning", "kernel", "linear"])
def test_safetensors(tmp_path, format):
    head = nf.NormFaceLoss(D, C, scale=30.0, learn_scale=format == "normface")
    (path,) = nf.save_head(head, tmp_path / "head.safetensors", format)
    loaded, report = nf.load_head(path)
    assert torch.equal(loaded.weight, head.weight) and report.format == format
    path.rename(tmp_path / "renamed.bin")  # as Hugging Face's first files
    assert torch.equal(nf.load_head(tmp_path / "renamed.bin").head.weight, head.weight)


def test_without_safetensors(tmp_path, monkeypatch):
    (path,) = nf.save_head(nf.NormFaceLoss(D, C), tmp_path / "head.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"head\.safetensors: needs safetensors.*pip install safetensors"):
        nf.load_head(path)
    with pytest.raises(ImportError, match="save_head: a safetensors file needs safetensors"):
        nf.save_head(nf.NormFaceLoss(D, C), tmp_path / "b.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["head.safetensors"]


HEAD = nf.NormFaceLoss(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((nn.Linear(3, 4), "a.pt"), TypeError, "`head` to be a NormFaceLoss, got Linear"),
        ((nf.NormFaceLoss(3, 4, device="meta"), "a.pt"), ValueError, "`head` with values"),
        ((HEAD, "a.pt", "keras"), ValueError, "`format` to be one of normface, insightface"),
        ((HEAD, "a", "adaface", 2), ValueError, "`ranks` to be 1 for the format 'adaface', got 2"),
        ((HEAD, "a", "insightface", 0), ValueError, "`ranks` >= 1, got 0"),
        ((HEAD, "a", "insightface", 5), ValueError, "`ranks` to be at most 4 classes, got 5"),
        ((HEAD, "a", "cvlface", 3), ValueError, "`ranks` to be a divisor of 4 classes, got 3"),
        ((HEAD, "a.safetensors", "adaface"), ValueError, "another suffix"),
    ],
)  # fmt: skip
def test_what_is_not_saved(tmp_path, arguments, error, text):
    head, name, *format = arguments
    ranks = {"ranks": format.pop()} if len(format) > 1 else {}
    with pytest.raises(error, match=f"save_head: expected {text}"):
        nf.save_head(head, tmp_path / name, *format, **ranks)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "head.pt"
    path.write_bytes(b"old")

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        nf.save_head(nf.NormFaceLoss(D, C), path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["head.pt"]
