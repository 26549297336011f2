"""Files of several ranks: joined in order; what is missing, there twice or of another run is named."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

import normface_ext as nf

C, D = 11, 4
ROWS = torch.randn(C, D, generator=torch.Generator().manual_seed(0))

#: name of a rank's file, what it holds, whether each rank has as many classes
RUNS = {
    "v2": ("checkpoint_gpu_{}.pt", lambda rows: {"epoch": 1, "state_dict_softmax_fc": {"weight": rows}}, 0),
    "2022": ("softmax_fc_gpu_{}.pt", lambda rows: OrderedDict(weight=rows), 0),
    "2021": ("rank_{}_softmax_weight.pt", lambda rows: rows, 0),
    "cvlface": ("model_rank{}.pt", lambda rows: {"partial_fc.weight": rows}, 1),
}  # fmt: skip


def written(folder, run, ranks, rows=ROWS):
    name, content, even = RUNS[run]
    folder.mkdir(exist_ok=True)
    parts = rows[: len(rows) // ranks * ranks].tensor_split(ranks) if even else rows.tensor_split(ranks)
    for rank, part in enumerate(parts):
        torch.save(content(part.clone()), folder / name.format(rank))
    for other in ("model.pt", "backbone.pth", "training.log", "rank_0_softmax_weight_mom.pt"):
        (folder / other).write_bytes(b"x")
    return [folder / name.format(rank) for rank in range(ranks)], torch.cat(parts)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_all_ranks_are_joined_in_order(tmp_path, run, ranks):
    paths, rows = written(tmp_path, run, ranks)
    for given in (tmp_path, str(tmp_path), paths[0], paths[-1], paths, paths[::-1]):
        head, report = nf.load_head(given)
        assert torch.equal(head.weight, rows)
        assert report.format == ("cvlface" if run == "cvlface" else "insightface")
        assert [name.rpartition("/")[2] for name in report.files] == [path.name for path in paths]
    assert any("padding" in note for note in report.notes) == (run == "cvlface" and ranks > 1)


@pytest.mark.parametrize("format", ["insightface", "cvlface"])
def test_what_is_saved_by_ranks(tmp_path, format):
    rows = 12 if format == "cvlface" else 11
    head = nf.NormFaceLoss(D, rows, scale=30.0)
    paths = nf.save_head(head, tmp_path / "run", format, ranks=4)
    assert sum(path.stat().st_size for path in paths) < 4 * 4000
    parts = [torch.load(path, weights_only=True) for path in paths]
    weights = [
        p["partial_fc.weight"] if format == "cvlface" else p["state_dict_softmax_fc"]["weight"] for p in parts
    ]
    assert torch.equal(torch.cat(weights), head.weight)
    assert [len(w) for w in weights] == ([3] * 4 if format == "cvlface" else [3, 3, 3, 2])
    assert torch.equal(nf.load_head(tmp_path / "run").head.weight, head.weight)


@pytest.mark.parametrize("run", RUNS)
def test_a_missing_rank_is_named(tmp_path, run):
    paths, _ = written(tmp_path, run, 5)
    paths[1].unlink(), paths[3].unlink()
    for given in (tmp_path, paths[0], [paths[0], paths[2], paths[4]]):
        with pytest.raises(ValueError, match=r"of all ranks from 0 to 4, got none of 1, 3"):
            nf.load_head(given)


def test_a_rank_twice_is_named(tmp_path):
    first, _ = written(tmp_path / "a", "v2", 2)
    second, _ = written(tmp_path / "b", "v2", 2)
    with pytest.raises(
        ValueError, match=r"every rank once, got rank 0 in .*a/checkpoint_gpu_0.pt and in .*b/"
    ):
        nf.load_head([*first, second[0]])
    (tmp_path / "a" / "checkpoint_gpu_01.pt").write_bytes(first[1].read_bytes())
    with pytest.raises(ValueError, match=r"got rank 1 in .*checkpoint_gpu_0?1.pt and in"):
        nf.load_head(tmp_path / "a")


@pytest.mark.parametrize("run", ["v2", "2022", "2021"])
def test_ranks_of_different_runs(tmp_path, run):
    paths, _ = written(tmp_path, run, 4)
    name, content, _ = RUNS[run]
    for rank, rows, text in (
        (3, torch.randn(9, D), "got 3: a rank is missing, or this file is of another run"),
        (3, torch.randn(2, D + 1), r"expected rows \[4\] of torch.float32 as in .*0.*, got \[5\]"),
        (
            2,
            torch.randn(3, D).double(),
            r"expected rows \[4\] of torch.float32 as in .*, got \[4\] of torch.float64",
        ),
    ):
        kept = paths[rank].read_bytes()
        torch.save(content(rows), tmp_path / name.format(rank))
        with pytest.raises(ValueError, match=text):
            nf.load_head(tmp_path)
        paths[rank].write_bytes(kept)
    nf.load_head(tmp_path)


def test_a_folder_of_two_kinds_and_of_none(tmp_path):
    with pytest.raises(ValueError, match="expected files of ranks"):
        nf.load_head(tmp_path)
    paths, rows = written(tmp_path, "v2", 2)
    written(tmp_path, "2022", 3)
    with pytest.raises(
        ValueError, match=r"got checkpoint_gpu_\*\.pt and softmax_fc_gpu_\*\.pt; pass the path of one"
    ):
        nf.load_head(tmp_path)
    assert torch.equal(nf.load_head(paths[1]).head.weight, rows)


def test_files_without_ranks_are_joined_as_given(tmp_path):
    paths = [tmp_path / "old.pt", tmp_path / "new.pt"]
    for path, part in zip(paths, ROWS.split(6), strict=True):
        torch.save({"W": part.T}, path)
    assert torch.equal(nf.load_head(paths).head.weight, ROWS)
    assert torch.equal(nf.load_head(paths[::-1]).head.weight, torch.cat([ROWS[6:], ROWS[:6]]))


def test_a_model_that_every_rank_saved_whole_is_not_joined(tmp_path):
    """Named like CVLface's parts, and no parts."""
    for rank in range(2):
        torch.save({"fc.weight": ROWS, "fc.bias": torch.zeros(C)}, tmp_path / f"model_rank{rank}.pt")
    assert torch.equal(nf.load_head(tmp_path / "model_rank1.pt").head.weight, ROWS)
