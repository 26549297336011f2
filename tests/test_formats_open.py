"""load_head: what can be read in more than one way is asked for; arguments; weights that no head can have."""

from __future__ import annotations

import pytest
import torch
from published_heads import BACKBONE, COLUMNS, EMBEDDING, ROWS, WRITTEN, C, D, right, under
from torch import nn

import normface_ext as nf
from normface_ext.formats import FORMATS

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
