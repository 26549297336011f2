"""The figures show what they are given, whatever it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from normface_ext import evaluation as ev


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: object, **options: object) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_scores_are_two_densities_and_lines(tmp_path: Path, drawn: list[Figure]):
    random = np.random.default_rng(0)
    same = random.random(5000) < 0.1
    scores = random.normal(size=5000) + 2 * same
    ev.plot_scores(scores, same, tmp_path / "s.png", thresholds={"a": 0.5, "b": 1.0}, bins=40, title="a net")
    axis = drawn[0].axes[0]
    width = (scores.max() - scores.min()) / 40
    areas = [sum(bar.get_height() for bar in bars) * width for bars in axis.containers]
    assert areas == pytest.approx([1, 1]) and [len(bars) for bars in axis.containers] == [40, 40]
    assert [line.get_xdata()[0] for line in axis.lines] == [0.5, 1.0] and axis.get_title() == "a net"
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert set(labels) == {
        f"different people, {(~same).sum():,} pairs",
        f"same person, {same.sum():,} pairs",
        "a",
        "b",
    }
    ev.plot_scores(np.zeros(4), [1, 0, 1, 0], tmp_path / "equal.svg")
    assert (tmp_path / "equal.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match="plot_scores: expected same and different pairs"):
        ev.plot_scores(np.zeros(4), [1, 1, 1, 1], tmp_path / "s.png")
    with pytest.raises(ValueError, match="`bins`"):
        ev.plot_scores(np.zeros(4), [1, 0, 1, 0], tmp_path / "s.png", bins=0)


def test_cmc_is_the_curve_of_each_result(tmp_path: Path, drawn: list[Figure]):
    random = np.random.default_rng(0)
    people = random.normal(size=(30, 8))
    results = {
        name: ev.identify(people, range(30), people + noise * random.normal(size=(30, 8)), range(30))
        for name, noise in (("clear", 0.3), ("noisy", 2.0))
    }
    ev.plot_cmc(results, tmp_path / "cmc.png", most=20)
    for line, result in zip(drawn[0].axes[0].lines, results.values(), strict=True):
        assert line.get_xdata().tolist() == list(range(1, 21))
        assert line.get_ydata().tolist() == result.cmc(20).tolist()
    alone = ev.identify(people[:1], [0], people[:1], [0])
    ev.plot_cmc({"alone": alone}, tmp_path / "one.png")
    assert drawn[1].axes[0].lines[0].get_ydata().tolist() == [1.0]
