"""docs/caffe-compatibility.md: every row names tests, and the tests exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "caffe-compatibility.md"
LAYERS = [
    "Accuracy", "ChannelScale", "CombinedMargin", "ContrastiveLoss", "CosinAddm", "Dropout", "Eltwise",
    "Flatten, Silence", "Flip", "GeneralContrastiveLoss", "GeneralTripletLoss", "InnerDistance",
    "InnerProduct", "LabelSpecificAdd", "LargeMarginInnerProduct", "MarginInnerProduct", "Normalize",
    "Parameter", "Power", "Scale", "Slice, Concat", "Softmax", "SoftmaxWithLoss", "TripletLoss",
]  # fmt: skip


def rows(text):
    """The cells of every row of the table below its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def missing(text):
    """What the rows name that is no test, and the rows that name none."""
    found = []
    for cells in rows(text):
        names = re.findall(r"`(\w+)::(\w+)`", cells[-1])
        found += [cells[0]] * (not names or len(cells) != 6)
        for file, name in names:
            path = TESTS / f"test_{file}.py"
            tree = ast.parse(path.read_text()).body if path.exists() else []
            if name not in [node.name for node in tree if isinstance(node, ast.FunctionDef)]:
                found.append(f"{file}::{name}")
    return found


@pytest.fixture
def page():
    if not PAGE.exists():
        pytest.skip("the docs are not beside these tests")
    return PAGE.read_text()


def test_every_row_is_proved_by_a_test(page):
    assert len(rows(page)) > 40
    assert missing(page) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_has_a_row(page, layer):
    assert any(cells[0].startswith(layer) for cells in rows(page))


def test_the_check_can_fail():
    head = "| a | b | c | d | e | f |\n|---|---|---|---|---|---|\n"
    row = "| x | | | | | {} |\n"
    assert missing(head + row.format("`mirror::test_mirror_face_refuses`")) == []
    assert missing(head + row.format("`mirror::test_nothing`")) == ["mirror::test_nothing"]
    assert missing(head + row.format("`nowhere::test_it`")) == ["nowhere::test_it"]
    assert missing(head + row.format("proved")) == ["x"]
    assert missing(head + "| x | `mirror::test_mirror_face_refuses` |\n") == ["x"]
