"""A fused margin costs three places: docs/architecture.md is followed to the letter, in a scratch copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEP = re.compile(
    r"<!-- into (?P<file>\S+) (?P<side>above|below): (?P<line>.+?) -->\n\n```\w+\n(?P<text>.*?)^```$",
    re.M | re.S,
)
PLACES = {
    "csrc/math/margins/margin.h",
    "normface_ext/softmax/margins.py",
    "normface_ext/reference/margins.py",
}
COPIED = (
    "csrc",
    "normface_ext",
    "tests",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
)

#: Of the margin alone: its formula by hand, and that the slopes in its numbers are right, on every lane.
CHECK = """
import torch, torch.nn.functional as F
from lanes import LANES
import normface_ext as nf
from normface_ext.softmax.margins import X2Softmax

assert {lane.name for lane in LANES} >= {"cpu", "emulated"}
for lane in LANES:
    with lane.active():
        x, weight = lane.randn(5, 6, dtype=torch.float64), lane.randn(4, 6, dtype=torch.float64, seed=7)
        labels, rows = lane.tensor([0, 3, 1, 1, 2]), torch.arange(5)
        numbers = [lane.tensor(torch.tensor(v, dtype=torch.float64), grad=True)
                   for v in (-0.3, -0.2, [0.9, 0.7, 0.8, 0.6])]

        def by_hand(x, weight, a, h, k):
            cosine = F.linear(F.normalize(x), F.normalize(weight))
            logits = cosine.clone()
            logits[rows, labels] = a * (cosine[rows, labels].acos() - h) ** 2 + k[labels]
            return F.cross_entropy(8 * logits, labels)

        def ours(x, weight, *numbers):
            return nf.functional.normface_loss(x, weight, labels, 8.0, margin=X2Softmax(*numbers))

        inputs = [x.requires_grad_(), weight.requires_grad_(), *numbers]
        losses = ours(*inputs), by_hand(*inputs)
        torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
        for found, right in zip(*(torch.autograd.grad(loss, inputs) for loss in losses)):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10)
        print("followed on", lane.name)
"""


def steps() -> list[re.Match[str]]:
    return list(STEP.finditer(PAGE))


def follow(step: re.Match[str], checkout: Path) -> None:
    """Puts the text above or below the one line that begins so."""
    path = checkout / step["file"]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (at,) = (i for i, line in enumerate(lines) if line.startswith(step["line"]))
    at += step["side"] == "below"
    path.write_text("".join([*lines[:at], step["text"], *lines[at:]]), encoding="utf-8")


def run(*command: str, cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_page_names_three_places():
    assert {step["file"] for step in steps()} == PLACES and len(steps()) == 7


def test_the_term_shown_is_the_one_there():
    (shown,) = re.findall(
        r"^```cpp\n(template <class T>\nstruct HardNegativesTerm .*?)^```$", PAGE, re.M | re.S
    )
    assert shown in (ROOT / "csrc/math/terms/hard_negatives.h").read_text(encoding="utf-8")


def test_every_file_that_the_recipes_name_is_there():
    """A path with a folder, or a file beside it in the same room."""
    recipes = PAGE[PAGE.index("## A fused margin") : PAGE.index("## A margin that looks")]
    recipes += PAGE[PAGE.index("## A term") :]
    for name in re.findall(r"`([\w/.]+\.(?:h|cu|cuh|cpp|py|json))`", recipes):
        assert any(ROOT.glob(f"**/{name}")) or name.startswith("NAME") or "/NAME." in name, name


@pytest.mark.slow
def test_a_margin_by_the_recipe(tmp_path):
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    checkout.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
            )
        else:
            shutil.copy(ROOT / name, checkout)
    for step in steps():
        follow(step, checkout)
    environment = {
        **os.environ,
        "NORMFACE_CUDA": "0",
        "PYTHONPATH": os.pathsep.join([str(site), str(checkout / "tests")]),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    run("setup.py", "-q", "build", "--build-lib", str(site), cwd=checkout, environment=environment)
    said = run("-c", CHECK, cwd=tmp_path, environment=environment)
    assert "followed on cpu" in said and "followed on emulated" in said
    # The project's own tests, which go over reference.MARGINS.
    tests = [
        "tests/test_normface_loss.py::test_gradcheck",
        "tests/test_reference.py",
    ]
    said = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "x2",
        *tests,
        cwd=checkout,
        environment=environment,
    )
    passed = int(re.search(r"(\d+) passed", said)[1])
    assert passed >= 15, said
