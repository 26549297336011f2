"""The committed results: what is quoted stands in them, and their summaries are made from them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_folder import FOLDER, modules


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    with modules() as found:
        yield found


def test_readme_quotes_the_gpu_results(bench: SimpleNamespace) -> None:
    """Each line of README's table on the H100 is in the results' file, marked as measured by hand."""
    root = FOLDER.parent
    rows = bench.report.read(FOLDER / "results" / "h100" / "kernels.jsonl")
    assert {row.how for row in rows} == {"by hand"} and {row.commit for row in rows} == {"75b7e35"}
    assert {row.torch for row in rows} == {"2.11.0+cu130"}
    text = (root / "README.md").read_text()
    results = text[text.index("NVIDIA H100") : text.index("## What the ops compute")]
    lines = [line.strip("| ").split(" | ") for line in results.splitlines() if line.startswith("| ")]
    assert len(lines) > 5
    for which, eager, ours, times in lines[1:]:
        batch, dim, classes, *replay = (part.strip() for part in re.split(r" x |, (?!\d{3})", which))
        size = (int(batch), int(dim), int(classes.replace(",", "")))
        mode = "fwd+bwd" + (", CUDA graph replay" if replay else "")
        found = {
            row.provider: row.median_ms
            for row in rows
            if size == (row.N, row.D, row.C) and (row.mode, row.dtype) == (mode, "mixed-bfloat16")
        }
        assert (found["eager"], found["normface_ext"]) == (float(eager), float(ours)), which
        assert times == f"{found['eager'] / found['normface_ext']:.1f}", which
    single = {
        row.C: f"{1 / row.ratio_to_eager:.1f}"
        for row in rows
        if (row.N, row.D, row.dtype, row.provider) == (256, 512, "float32", "normface_ext")
    }
    assert f"were {single[85_742]} and {single[10_572]} times faster" in results


RECORDS = sorted((FOLDER / "results").rglob("kernels*.jsonl"))


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_summary_is_made_from_its_rows(bench: SimpleNamespace, file: Path) -> None:
    assert file.with_suffix(".md").read_text() == bench.report.summary(bench.report.read(file))
