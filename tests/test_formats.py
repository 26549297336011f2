"""load_head and save_head: files as other libraries write them, by their names and shapes.

What each library writes is stated here by hand: the dicts below are what its training code gives torch.save.
"""

from __future__ import annotations

import argparse
import pathlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import normface_ext as nf
from normface_ext.formats import FORMATS, HeadReport
from normface_ext.softmax.margins import Margin

C, D = 11, 6
ROWS = torch.randn(C, D, generator=torch.Generator().manual_seed(0)) * 3
COLUMNS = ROWS.T.contiguous()
ONE = torch.ones(1)
BACKBONE = {
    "conv1.weight": torch.randn(4, 3, 3, 3), "fc.weight": torch.randn(D, 9), "fc.bias": torch.randn(D),
    "features.weight": torch.ones(D), "features.bias": torch.zeros(D),
    "features.running_mean": torch.zeros(D), "features.running_var": torch.ones(D),
}  # fmt: skip
#: The backbone of AdaFace and FaceX-Zoo ends with a linear layer and a BatchNorm1d of size D.
EMBEDDING = {"layer.0.weight": torch.randn(4, 3, 3, 3), "output.3.weight": torch.randn(D, 9)}


def under(prefix, tensors):
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def optimizer_state(*shapes):
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer.state_dict()


def insightface(rows=ROWS):
    """arcface_torch, train_v2.py with save_all_states: one per rank."""
    return {
        "epoch": 3, "global_step": 700, "state_dict_backbone": OrderedDict(BACKBONE),
        "state_dict_softmax_fc": OrderedDict(weight=rows),
        "state_optimizer": optimizer_state((4, 3), rows.shape),
        "state_lr_scheduler": {"base_lrs": [0.1], "last_epoch": 700, "max_steps": 900, "_step_count": 701},
    }  # fmt: skip


def adaface():
    """A LightningModule with `model` and `head`; hyper-parameters from argparse."""
    head = {"kernel": COLUMNS, "t": torch.zeros(1), "batch_mean": 21 * ONE, "batch_std": 90 * ONE}
    return {
        "epoch": 2, "global_step": 9, "pytorch-lightning_version": "1.4.4",
        "state_dict": OrderedDict(under("model.", EMBEDDING) | under("head.", head)),
        "callbacks": {pathlib.PurePosixPath: {"best": np.float64(0.9), "dirpath": pathlib.Path("a")}},
        "optimizer_states": [optimizer_state((D, C))], "lr_schedulers": [{"gamma": 0.1, "last_epoch": 2}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"head": "adaface", "m": 0.4, "h": 0.333, "s": 48.0, "t_alpha": 0.01, "lr": 0.1,
                             "args": argparse.Namespace(x=1)},
    }  # fmt: skip


def facex_zoo(name, value):
    """conventional_training/train.py: a FaceModel of `backbone` and `head`."""
    state = under("backbone.", EMBEDDING) | {f"head.{name}": value}
    return {"state_dict": OrderedDict(state), "epoch": 4, "batch_id": 2999}


#: what torch.save gets -> format, entry, layout
WRITTEN = {
    "insightface": (insightface(), "insightface", "state_dict_softmax_fc/weight", "[C, D]"),
    "adaface": (adaface(), "adaface", "state_dict/head.kernel", "[D, C]"),
    "adaface head": (
        {"kernel": COLUMNS, "t": ONE, "batch_mean": ONE, "batch_std": ONE}, "adaface", "kernel", "[D, C]",
    ),
    "cvlface": (
        {"partial_fc.weight": ROWS, "partial_fc.batch_mean": ONE, "partial_fc.batch_std": ONE},
        "cvlface", "partial_fc.weight", "[C, D]",
    ),
    "cvlface fc": (
        {"classifier.weight": ROWS, "classifier.batch_mean": ONE, "classifier.batch_std": ONE},
        "cvlface", "classifier.weight", "[C, D]",
    ),
    "facex-zoo arcface": (facex_zoo("weight", COLUMNS), "facex-zoo", "state_dict/head.weight", "[D, C]"),
    "facex-zoo npcface": (facex_zoo("kernel", COLUMNS), "facex-zoo", "state_dict/head.kernel", "[D, C]"),
    "facex-zoo adacos": (facex_zoo("W", ROWS), "facex-zoo", "state_dict/head.W", "[C, D]"),
    "pml": ({"W": COLUMNS}, "pytorch-metric-learning", "W", "[D, C]"),
    "pml in a model": (
        {"trunk.0.weight": torch.randn(D, 5, 1, 1), "loss_func.W": COLUMNS},
        "pytorch-metric-learning", "loss_func.W", "[D, C]",
    ),
    "pml proxies": ({"proxies": ROWS}, "pytorch-metric-learning", "proxies", "[C, D]"),
    "magface": (
        {"epoch": 1, "arch": "iresnet100", "best_prec1": 0,
         "state_dict": under("features.module.", BACKBONE) | {"module.fc.weight": COLUMNS}},
        "magface", "state_dict/module.fc.weight", "[D, C]",
    ),
    "magface in parallel": (
        {"state_dict": under("features.module.", BACKBONE) | {"fc.weight": ROWS}},
        "linear", "state_dict/fc.weight", "[C, D]",
    ),
    "adaface weights alone": (
        under("model.", EMBEDDING) | {"head.kernel": COLUMNS}, "adaface", "head.kernel", "[D, C]",
    ),
    "curricularface": ({"kernel": COLUMNS, "t": ONE}, "kernel", "kernel", "[D, C]"),
    "elasticface": ({"module.kernel": COLUMNS}, "kernel", "module.kernel", "[D, C]"),
    "timm": (
        under("blocks.", EMBEDDING) | {"head.weight": ROWS, "head.bias": torch.zeros(C)},
        "linear", "head.weight", "[C, D]",
    ),
    "timm conv": (
        {"stem.0.weight": torch.randn(4, 3, 3, 3), "head.fc.weight": ROWS, "head.fc.bias": torch.zeros(C)},
        "linear", "head.fc.weight", "[C, D]",
    ),
    "torchvision mobilenet": (
        {"features.0.weight": torch.ones(4, 3, 3, 3), "classifier.1.weight": ROWS, "classifier.1.bias": ONE},
        "linear", "classifier.1.weight", "[C, D]",
    ),
    "torchvision": (
        {"conv1.weight": torch.randn(4, 3, 3, 3), "fc.weight": ROWS, "fc.bias": torch.zeros(C)},
        "linear", "fc.weight", "[C, D]",
    ),
    "linear": (nn.Linear(D, C, bias=False).state_dict() | {"weight": ROWS}, "linear", "weight", "[C, D]"),
    "compiled": ({"_orig_mod.module.fc.weight": ROWS, "_orig_mod.module.fc.bias": torch.zeros(C)},
                 "linear", "_orig_mod.module.fc.weight", "[C, D]"),
}  # fmt: skip


def features(dtype=torch.float32, size=D):
    return torch.randn(5, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def right(loaded, rows=ROWS):
    head, report = loaded
    assert isinstance(head, nf.NormFaceLoss) and isinstance(report, HeadReport)
    assert (head.num_classes, head.in_features) == (report.classes, report.features) == tuple(rows.shape)
    assert torch.equal(head.weight, rows) and head.weight.dtype == report.dtype == rows.dtype
    x = features(rows.dtype, rows.shape[1])
    cosines = nn.functional.linear(*map(nn.functional.normalize, (x, rows)))
    torch.testing.assert_close(head.logits(x), head.scale_value() * cosines)
    assert head.weight.is_contiguous() and head.weight.is_leaf and head.weight.requires_grad
    return head, report


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_files_are_recognised(tmp_path, name, legacy):
    """Also of torch before 1.6, which Lightning's classes beside the tensors never were in."""
    content, format, entry, layout = WRITTEN[name]
    path = tmp_path / "epoch=2.ckpt"
    content = {"state_dict": content["state_dict"]} if legacy and name == "adaface" else content
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    head, report = right(nf.load_head(path, scale=64.0))
    assert (report.format, report.entry, report.layout) == (format, entry, layout)
    assert len(report.files) == 1 and report.files[0].endswith("epoch=2.ckpt") and head.scale == 64
    right(nf.load_head(str(path), format))
    assert str(report).splitlines()[0] == f"{format} head of {C} classes, {D} features, torch.float32"


@pytest.mark.parametrize("name", WRITTEN)
def test_dicts_are_recognised(name):
    content, format, entry, layout = WRITTEN[name]
    _, report = right(nf.load_head(content))
    assert (report.format, report.entry, report.layout, report.files) == (format, entry, layout, ())


def test_the_report_says_what_was_found_and_left_out(tmp_path):
    torch.save(adaface(), tmp_path / "a.ckpt")
    head, report = nf.load_head(tmp_path / "a.ckpt")
    assert head.scale == report.scale == 48 and report.notes == (
        "no margin is stored as numbers, `margin` sets it: none",
    )
    assert report.stored == {"t": 0, "batch_mean": 21, "batch_std": 90, "m": 0.4, "h": 0.333, "t_alpha": 0.01}
    assert "model (2 tensors)" in report.left_out and "optimizer_states" in report.left_out
    assert nf.load_head(tmp_path / "a.ckpt", scale=30.0).head.scale == 30
    _, report = nf.load_head(WRITTEN["timm"][0])
    assert report.left_out == ("head.bias [11]", "blocks (2 tensors)") and report.scale is None
    _, report = nf.load_head(insightface())
    assert "state_dict_backbone (7 tensors)" in report.left_out and "trains with 64" in str(report)
    margin = nf.ArcFace(0.5)
    assert nf.load_head(insightface(), margin=margin, scale=64).head.margin is margin


@pytest.mark.parametrize("prefix", ["", "head.", "model.loss."])
@pytest.mark.parametrize("options", [
    {"scale": 12.5}, {"scale": 20.0, "margin": nf.CosFace(0.2)}, {"scale": 9.0, "learn_scale": True},
    {"scale": 0.004, "min_scale": 0.001}, {"scale": 0.004, "min_scale": 0.001, "learn_scale": True},
])  # fmt: skip
def test_our_own_state_comes_back_whole(tmp_path, options, prefix):
    mine = nf.NormFaceLoss(D, C, **options)
    torch.save(under(prefix, mine.state_dict()) | {"backbone.weight": torch.ones(D, 9)}, tmp_path / "own.pt")
    head, report = nf.load_head(tmp_path / "own.pt")
    assert report.format == "normface" and head.learn_scale == mine.learn_scale and head.margin == mine.margin
    assert head.scale_value() == pytest.approx(mine.scale_value()) and report.scale == pytest.approx(
        mine.scale_value()
    )
    labels = torch.arange(5)
    torch.testing.assert_close(head(features(), labels), mine(features(), labels), rtol=0, atol=0)
    assert nf.load_head(tmp_path / "own.pt", scale=7.0, margin=nf.ArcFace(0.1)).head.margin == nf.ArcFace(0.1)


class Running(nn.Module, Margin):
    """A margin with a state."""

    m1, m2, m3 = 1.0, 0.0, 0.1
    __hash__, __eq__ = object.__hash__, object.__eq__

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))


@pytest.mark.parametrize("prefix", ["", "head."])
def test_the_state_of_a_margin_comes_back(prefix):
    mine = nf.NormFaceLoss(D, C, margin=Running())
    mine.margin.mean.fill_(3)
    state = under(prefix, mine.state_dict())
    head, report = nf.load_head(state, margin=Running())
    assert head.margin.mean == 3 and report.left_out == ()
    _, report = nf.load_head(state)
    assert report.left_out == (f"{prefix}margin.mean [1]",)
    with pytest.raises(
        ValueError, match=rf"state_dict: expected the state of Running in '{prefix}margin', got"
    ):
        nf.load_head({**state, f"{prefix}margin.other": ONE}, margin=Running())


def test_the_statistics_of_adaface_reach_a_margin_that_has_them(tmp_path):
    class Norms(Running):
        def __init__(self):
            super().__init__()
            self.register_buffer("std", torch.zeros(1, dtype=torch.float64))

    torch.save(adaface(), tmp_path / "a.ckpt")
    head, report = nf.load_head(tmp_path / "a.ckpt", margin=Norms())
    assert (head.margin.mean.item(), head.margin.std.item()) == (21, 90) and report.stored["batch_std"] == 90
    assert nf.load_head(tmp_path / "a.ckpt", margin=Running()).head.margin.mean == 0
    bad = {**adaface(), "hyper_parameters": {"s": -1.0}}
    with pytest.raises(ValueError, match="state_dict: expected a scale in the hyper-parameters, got"):
        nf.load_head(bad)


@pytest.mark.parametrize("stands", [-0.5, 0.0, 0.005, 1e6])
def test_a_learned_scale_stands_where_it_stood(stands):
    mine = nf.NormFaceLoss(D, C, scale=9.0, learn_scale=True)
    with torch.no_grad():
        mine.scale.fill_(stands)
    head, report = nf.load_head(mine.state_dict())
    assert torch.equal(head.scale, mine.scale) and head.learn_scale and report.scale == pytest.approx(stands)
    assert nf.load_head(mine.state_dict(), scale=12.0).head.scale.item() == 12
    for wrong in (torch.tensor([torch.nan]), torch.ones(2)):
        with pytest.raises(
            ValueError, match="state_dict: expected the state of a NormFaceLoss in 'weight', got"
        ):
            nf.load_head({**mine.state_dict(), "scale": wrong})


def test_our_own_state_of_before_extra_state():
    """The weight alone, or with a learned scale of 0 dimensions."""
    _, report = right(nf.load_head({"weight": ROWS}))
    assert report.format == "linear"
    head, report = right(nf.load_head({"weight": ROWS, "scale": torch.tensor(17.0)}))
    assert report.format == "normface" and head.learn_scale and head.scale_value() == 17
    _, report = nf.load_head({"weight": ROWS, "scale": torch.ones(C)})  # not a head's
    assert report.format == "linear" and report.left_out == ("scale [11]",)
    right(nf.load_head({"weight": ROWS}, "normface"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(tmp_path, dtype):
    torch.save({"W": COLUMNS.to(dtype)}, tmp_path / "w.pt")
    head, _ = nf.load_head(tmp_path / "w.pt", device="cpu")
    assert torch.equal(head.weight, ROWS.to(dtype)) and head.weight.dtype == dtype


def test_reading_draws_no_random_numbers(tmp_path):
    state = torch.get_rng_state()
    nf.load_head({"W": COLUMNS})
    assert torch.equal(torch.get_rng_state(), state)


# One that is open is asked for ----------------------------------------------------------------------------

SQUARE = torch.randn(D, D)
OPEN = {
    "head.weight": ({"head.weight": ROWS}, r"as \[D, C\] of facex-zoo and .* of linear; `format` or"),
    "square": ({"head.weight": SQUARE}, "`format` or `layout` chooses"),
    "head.W": ({"head.W": ROWS}, r"as \[C, D\] of facex-zoo and .*metric-learning; `format` or `layout`"),
    "fc.weight": (
        {"fc.weight": ROWS, "features.a": torch.ones(3)}, "of magface and .* of linear; `format` or `layout`",
    ),
    "two": ({"a.kernel": COLUMNS, "b.kernel": COLUMNS}, "'a.kernel' .*'b.kernel' .*; `entry` chooses"),
    "many": ({f"{i}.W": COLUMNS for i in range(9)}, "and 7 more; `entry` chooses"),
    "ema": ({"state_dict": {"W": COLUMNS}, "ema": {"W": COLUMNS}}, "'state_dict/W' .*'ema/W' .*; `entry`"),
    "unknown": ({"table": ROWS}, r"by a known name, got 'table' \[11, 6\]; `layout` .*choose"),
    "unknowns": ({"a": ROWS, "b": ROWS}, r"got 'a' \[11, 6\], 'b' \[11, 6\]; `entry` and `layout`"),
    "backbone": (BACKBONE, r"by a known name, got 'fc\.weight' \[6, 9\]"),
    "a tensor": (ROWS, r"got a tensor \[11, 6\]; `layout`"),
    "no matrix": ({"b": torch.ones(3), "n": torch.ones(3, 3, dtype=torch.int64)}, "got no floating matrix"),
    "empty": ({}, "got no tensors"),
    "a list": ([ROWS], "got no tensors"),
    "a number": (3, "got no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN)
def test_what_is_open_is_asked_for(tmp_path, name):
    content, text = OPEN[name]
    torch.save(content, tmp_path / "open.pt")
    with pytest.raises(ValueError, match=rf"open\.pt: expected (one|the) weight of a head.*{text}") as raised:
        nf.load_head(tmp_path / "open.pt")
    assert len(str(raised.value)) <= 300


def test_the_keywords_settle_it(tmp_path):
    for format, rows in (("facex-zoo", ROWS.T), ("linear", ROWS)):
        right(nf.load_head({"head.weight": ROWS}, format), rows)
    for layout, rows in (("features_first", ROWS.T), ("classes_first", ROWS)):
        for content in ({"head.weight": ROWS}, {"table": ROWS}, {"head.W": ROWS}):
            right(nf.load_head(content, layout=layout), rows)
        torch.save(ROWS, tmp_path / "bare.pt")
        right(nf.load_head(tmp_path / "bare.pt", layout=layout), rows)
    right(nf.load_head(tmp_path / "bare.pt", "linear"))
    right(nf.load_head(tmp_path / "bare.pt", "pytorch-metric-learning", layout="features_first"), ROWS.T)
    two = {"state_dict": {"module.W": COLUMNS, "b": ROWS}, "ema": {"W": 2 * COLUMNS}}
    right(nf.load_head(two, entry="state_dict/module.W"))
    right(nf.load_head(two, entry="ema/W"), 2 * ROWS)
    right(nf.load_head(two, entry="b", layout="classes_first"))
    with pytest.raises(ValueError, match="expected a floating matrix in the entry 'c', got none"):
        nf.load_head(two, entry="c")
    with pytest.raises(ValueError, match="`entry` chooses"):
        nf.load_head(two, entry="W")


def test_shapes_settle_what_names_leave_open():
    """The features' size is that of what the backbone puts out."""
    for value, format in ((ROWS, "linear"), (COLUMNS, "facex-zoo")):
        _, report = right(nf.load_head(under("backbone.", EMBEDDING) | {"head.weight": value}))
        assert report.format == format
    both = {"backbone.weight": torch.ones(D, 9), "backbone.other": torch.ones(C, 9), "head.weight": ROWS}
    with pytest.raises(ValueError, match="`format` or `layout` chooses"):
        nf.load_head(both)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((nn.Linear(3, 4),), TypeError, "`path_or_state_dict` .* got Linear; pass its state_dict"),
        ((torch.ones(3, 4),), TypeError, "`path_or_state_dict` to be a path, .* got Tensor"),
        (([],), TypeError, "`path_or_state_dict`"),
        (({"W": ROWS}, "keras"), ValueError, "`format` to be one of auto, normface, .* got 'keras'"),
        (({"W": ROWS}, "auto", {"layout": "DC"}), ValueError, "`layout` to be one of classes_first"),
        (({"W": ROWS}, "auto", {"entry": 3}), TypeError, "`entry` to be a string, got int"),
        (({"W": ROWS}, "auto", {"device": "gpu"}), ValueError, "`device` to be a device"),
    ],
)  # fmt: skip
def test_arguments(arguments, error, text):
    *given, options = (
        arguments if isinstance(arguments[-1], dict) and len(arguments) > 2 else (*arguments, {})
    )
    with pytest.raises(error, match=f"load_head: expected {text}"):
        nf.load_head(*given, **options)


def spoiled(row, value):
    columns = COLUMNS.clone()
    columns[3, row] = value
    return columns


def test_weights_that_no_head_can_have(tmp_path):
    for value, text in (
        (ROWS / 0, "finite numbers in 'W', got NaN or infinity for class 0"),
        (
            spoiled(2, torch.nan),
            "finite numbers in 'W', got NaN or infinity for class 2",
        ),
        (
            spoiled(9, -torch.inf),
            "finite numbers in 'W', got NaN or infinity for class 9",
        ),
        (torch.empty(0, 4), "a dense matrix in 'W'"),
        (ROWS.to_sparse(), "a dense matrix in 'W'"),
    ):
        torch.save({"W": value}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=rf"w\.pt: expected {text}"):
            nf.load_head(tmp_path / "w.pt")
    one = torch.ones(1).expand(1 << 20, 1 << 20)
    torch.save({"W": one}, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size < 5000
    with pytest.raises(ValueError, match=r"a dense matrix in 'W', got .* of 4 bytes"):
        nf.load_head(tmp_path / "w.pt")


def test_every_format_is_tested():
    assert {format for _, format, _, _ in WRITTEN.values()} | {"normface"} == set(FORMATS)
