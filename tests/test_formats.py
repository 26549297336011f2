"""load_head: files as other libraries write them are recognised, and what was found is said."""

from __future__ import annotations

import pytest
import torch
from published_heads import COLUMNS, ONE, ROWS, WRITTEN, C, D, adaface, features, insightface, right, under
from torch import nn

import normface_ext as nf
from normface_ext.softmax.margins import Margin


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
    formula = 0
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
