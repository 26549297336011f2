"""The figure examples in tiny settings: the numbers behind the figures, not the pixels."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import combined_objective
import common
import compare_heads
import compare_losses
import figure_convergence
import figure_features
import figure_gradient_geometry
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import normface_ext as nf

ONE = common.Size(1, 1)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def is_figure(path: Path) -> bool:
    """A PNG with more in it than empty axes."""
    raw = path.read_bytes()
    return raw[:8] == b"\x89PNG\r\n\x1a\n" and len(raw) > 20_000


# -------------------------------------------------------------------------------------------- shared


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def test_idx_files_are_read_and_missing_ones_explained(tmp_path: Path):
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.array([3, 200], dtype=np.uint8))
    got, labels = common.fashion(tmp_path)
    np.testing.assert_array_equal(got, np.concatenate([images, images]))
    assert labels.tolist() == [3, 200, 3, 200]
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SystemExit, match=r"t10k-labels.*missing.*apt-get install dataset-fashion-mnist"):
        common.fashion(tmp_path)
    (tmp_path / "bad.gz").write_bytes(gzip.compress(b"hello world"))
    with pytest.raises(SystemExit, match="expected an IDX file"):
        common.read_idx(tmp_path / "bad.gz")


@pytest.mark.skipif(not common.FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_loads():
    options = common.parser(None, "x", ONE).parse_args(["--data", "fashion-mnist", "--images", "500"])
    data = common.load(options)
    assert data.train_images.shape == (350, 1, 28, 28)
    assert data.train_labels.bincount().tolist() == [35] * 10
    assert (data.train_images.min(), data.train_images.max()) == (0, 1)


def test_sizes_follow_the_data():
    parser = common.parser(None, "x", common.Size(40, 8), common.Size(100, 50))
    parser.add_size("runs", "seeds", common.Size(10, 4))
    digits, others = parser.parse_args([]), parser.parse_args(["--data", "fashion-mnist"])
    assert (digits.epochs, digits.images, digits.runs) == (40, 100, 10)
    assert (others.epochs, others.images, others.runs) == (8, 50, 4)
    assert parser.parse_args(["--data", "x", "--epochs", "3"]).epochs == 3


def test_a_folder_of_images_is_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    random = np.random.default_rng(0)
    for name, brightness in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for i in range(10):
            pixels = random.integers(brightness, brightness + 10, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    (tmp_path / "dark" / "broken.png").write_bytes(b"no image")
    options = common.parser(None, "x", ONE).parse_args(["--data", str(tmp_path)])
    data = common.load(options)
    assert "broken.png: unreadable" in capsys.readouterr().err
    assert data.names == ("dark", "light")
    assert data.train_images.shape == (14, 1, common.FOLDER_SIZE, common.FOLDER_SIZE)
    means = data.train_images.mean((1, 2, 3)) * 255
    assert torch.equal(data.train_labels, (means > 100).long())
    for wrong, sentence in ((tmp_path / "dark", "at least 2 folders"), ("fashion", "expected digits")):
        with pytest.raises(SystemExit, match=sentence):
            common.load(common.parser(None, "x", ONE).parse_args(["--data", str(wrong)]))
    with pytest.raises(SystemExit, match="at least 5 classes, got 2"):
        compare_losses.main(["--data", str(tmp_path), "--out", str(tmp_path)])


@pytest.mark.parametrize("size", [8, 17, 28, 64])
def test_lenet_takes_images_of_any_size(size: int):
    torch.manual_seed(0)
    features = common.lenet(5, size)(torch.rand(3, 1, size, size))
    assert features.shape == (3, 5)
    assert (features < 0).any()  # it may point anywhere


def test_digits_are_split_without_overlap_and_seeds_repeat():
    options = common.parser(None, "x", ONE).parse_args([])
    data, again = common.load(options), common.load(options)
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert torch.equal(data.train_images, again.train_images)
    train = {image.numpy().tobytes() for image in data.train_images}
    assert not train & {image.numpy().tobytes() for image in data.test_images}

    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        net, head = common.lenet(4, data.size), nf.NormFaceLoss(4, 10)
        images, labels = data.train_images[:129], data.train_labels[:129]  # a last batch of one image
        common.train(net, head, images, labels, epochs=1, seed=seed, name="test")
        return head.weight.detach()

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_pairs_are_balanced_distinct_and_rightly_labelled():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    first, second, same = common.pairs_of(labels, 100, seed=0)
    assert same.sum() == (~same).sum() == 4
    assert ((labels.numpy()[first] == labels.numpy()[second]) == same).all()
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 8


# ------------------------------------------------------------------------------------------- figures


@pytest.mark.slow
def test_figure_features(tmp_path: Path):
    clouds = figure_features.main(
        ["--out", str(tmp_path), "--epochs", "10", "--images", "700", "--device", "cpu"]
    )
    assert is_figure(tmp_path / "features_2d.png")
    assert is_figure(tmp_path / "features_3d.png")
    by_name = {c.name: c for c in clouds}
    for row in rows_of(tmp_path / "features.csv"):
        cloud = by_name[row["head"]]
        assert float(row["spread_degrees"]) == pytest.approx(cloud.spread, rel=1e-5)
        assert float(row["accuracy_by_angle"]) == pytest.approx(cloud.by_angle, rel=1e-5)
        # What the CSV says is what the points show.
        unit = cloud.features / np.linalg.norm(cloud.features, axis=1, keepdims=True)
        weight = cloud.weight / np.linalg.norm(cloud.weight, axis=1, keepdims=True)
        assert ((unit @ weight.T).argmax(1) == cloud.labels).mean() == pytest.approx(cloud.by_angle)
    assert min(c.by_angle for c in clouds if c.name.startswith("s =")) > 0.6  # 3-D
    assert min(c.by_angle for c in clouds) > 0.3  # 2-D is slow to learn
    # A small scale goes on pulling at samples that are right: tighter clusters.
    assert by_name["s = 1"].spread < by_name["s = 11"].spread


def test_the_seed_decides_everything():
    data = common.load(common.parser(None, "x", ONE).parse_args(["--images", "300"]))

    def weight(make, seed: int) -> np.ndarray:
        torch.rand(1)  # whatever was drawn before
        return figure_features.cloud("test", data, make, 2, 1, seed).weight

    for make in (lambda: common.Softmax(2, 10), lambda: nf.NormFaceLoss(2, 10)):
        np.testing.assert_array_equal(weight(make, 3), weight(make, 3))
        assert (weight(make, 3) != weight(make, 4)).any()
    first, second = (figure_convergence.run("test", data, 1, 0, scale=4.0)[0].losses for _ in range(2))
    assert first == second


def test_spread_by_hand():
    angle = torch.deg2rad(torch.tensor([10.0, 30.0, 170.0, 190.0]))
    features = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([[1.0], [5.0], [2.0], [0.1]])
    got = figure_features.spread_in_degrees(features, torch.tensor([0, 0, 1, 1]))
    assert got == pytest.approx(10, abs=1e-3)


@pytest.mark.slow
def test_figure_convergence(tmp_path: Path):
    histories, pulls = figure_convergence.main(["--out", str(tmp_path), "--epochs", "6", "--device", "cpu"])
    assert is_figure(tmp_path / "convergence.png")
    for name, history in histories.items():
        for scale, loss in zip(history.scales, history.losses, strict=True):
            if name != "learned s":  # whose scale moved during the epoch
                assert loss > nf.theory.loss_lower_bound(10, scale) * 0.999, name
    assert 1.377 < histories["s = 1"].losses[-1] < 1.45
    assert histories["s = 10"].losses[-1] < 0.05
    assert histories["learned s"].scales[-1] > 2
    ratios = [pulls[f"s = {s}"].hard_over_easy for s in (1, 4, 10, 30)]
    assert ratios == sorted(ratios)
    assert ratios[0] < 1.3
    assert ratios[2] > 10
    assert pulls["s = 1"].share_of_hardest_tenth < 0.13
    shares = [pulls[f"s = {s}"].share_of_hardest_tenth for s in (1, 4, 10, 30)]
    assert shares == sorted(shares)
    assert shares[-1] > 0.25  # after one epoch, when more than a tenth is hard
    table = rows_of(tmp_path / "convergence.csv")
    assert [float(r["loss"]) for r in table if r["head"] == "s = 4"] == pytest.approx(
        histories["s = 4"].losses, rel=1e-5
    )


def test_pull_by_hand():
    # Two classes with cosines +1 and -1: p = e / (e + 1/e), and the gradient is (p - 1, 1 - p).
    p = figure_convergence.pull(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([0, 0]), 1.0)
    right = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(p.strength, np.sqrt(2) * np.array([1 - right, right]), rtol=1e-12)
    np.testing.assert_allclose(p.lead, [2, -2])
    shares = figure_convergence.Pull(np.arange(10.0), np.array([5.0] + [1.0] * 9))
    assert shares.share_of_hardest_tenth == pytest.approx(5 / 14)
    assert shares.hard_over_easy == pytest.approx(5)


def test_figure_gradient_geometry(tmp_path: Path):
    arguments = ["--out", str(tmp_path), "--epochs", "1", "--images", "600", "--device", "cpu"]
    paths, cosines = figure_gradient_geometry.main(arguments)
    assert is_figure(tmp_path / "geometry.png")
    for path in paths.values():
        assert path.tangency < 1e-10
        np.testing.assert_allclose(path.lengths, path.predicted, rtol=1e-10)
        assert (np.diff(path.lengths, axis=0) > -1e-12).all()
        assert path.losses[-1] < 0.01 * path.losses[0]
    assert paths[3.0].lengths[-1, 0] > paths[0.3].lengths[-1, 0] > 1.1
    assert cosines["NormFaceLoss"].max() < 1e-5
    assert np.median(cosines["softmax"]) > 0.1
    assert len(rows_of(tmp_path / "geometry.csv")) == 3 * 13


def test_first_step_on_the_circle_by_hand():
    # From (1, 0) and (0, 1): the gradient with respect to x is -(0, 1), so x moves to (1, rate).
    path = figure_gradient_geometry.descend(0.5, 1, degrees=(0.0, 90.0))
    np.testing.assert_allclose(path.points[1], [[1, 0.5], [0.5, 1]], atol=1e-9)
    assert path.losses[0] == pytest.approx(1)


@pytest.mark.slow
def test_combined_objective(tmp_path: Path):
    found = combined_objective.main(["--out", str(tmp_path), "--epochs", "5", "--device", "cpu"])
    assert is_figure(tmp_path / "combined.png")
    table = rows_of(tmp_path / "combined.csv")
    assert [row["objective"] for row in table] == list(combined_objective.HEADS)
    for d, row in zip(found, table, strict=True):
        assert d.accuracy > 0.9
        assert 0 < d.own.mean() < d.other.mean() < 4
        assert float(row["ratio"]) == pytest.approx(d.other.mean() / d.own.mean(), rel=1e-5)


# ------------------------------------------------------------------------------------ compare_losses


@pytest.mark.parametrize("name", compare_losses.heads())
def test_every_head_trains_features_and_itself(name: str):
    torch.manual_seed(0)
    head = compare_losses.heads()[name](7)
    features = torch.randn(20, compare_losses.FEATURES, requires_grad=True)
    labels = torch.arange(20) % 7
    head(features, labels).backward()
    assert features.grad.norm() > 1e-3
    assert all(p.grad.isfinite().all() and p.grad.norm() > 1e-3 for p in head.parameters())
    optimizer = torch.optim.Adam([features, *head.parameters()], lr=0.05)
    before = float(head(features, labels).detach())
    for _ in range(50):
        loss = head(features, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * before


@pytest.mark.slow
def test_compare_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    real = compare_losses.train

    def spy(backbone: nn.Module, head: nn.Module, images: torch.Tensor, labels: torch.Tensor, **options):
        seen.append({i.numpy().tobytes(): int(label) for i, label in zip(images, labels, strict=True)})
        return real(backbone, head, images, labels, **options)

    monkeypatch.setattr(compare_losses, "train", spy)
    arguments = ["--out", str(tmp_path), "--runs", "2", "--epochs", "3", "--device", "cpu"]
    runs = compare_losses.main([*arguments, "--heads", "softmax", "NormFace"])
    assert is_figure(tmp_path / "compare_losses.png")
    assert [(r.head, r.run) for r in runs] == [(h, run) for run in (0, 1) for h in ("softmax", "NormFace")]
    data = common.load(common.parser(None, "x", ONE).parse_args([]))
    digits = {i.numpy().tobytes(): int(d) for i, d in zip(data.train_images, data.train_labels, strict=True)}
    for run, images in zip(runs, seen, strict=True):
        trained = {digits[image] for image in images}
        assert trained == set(range(10)) - {int(word) for word in run.left_out.split()}
        assert len(trained) == 7
        assert set(images.values()) == set(range(7))
    assert seen[0] == seen[1] != seen[2]
    for run in runs:
        assert run.seen > 0.9
        assert 0.5 <= run.unseen < run.seen
    row = next(r for r in rows_of(tmp_path / "summary.csv") if r["head"] == "NormFace")
    mine = [r.unseen for r in runs if r.head == "NormFace"]
    base = [r.unseen for r in runs if r.head == "softmax"]
    assert float(row["unseen"]) == pytest.approx(np.mean(mine), rel=1e-5)
    assert float(row["unseen_deviation"]) == pytest.approx(np.std(mine, ddof=1), rel=1e-5)
    gaps = np.array(mine) - np.array(base)
    assert float(row["gap"]) == pytest.approx(gaps.mean(), rel=1e-5, abs=1e-12)
    assert float(row["gap_error"]) == pytest.approx(gaps.std(ddof=1) / np.sqrt(2), rel=1e-5, abs=1e-12)


# ------------------------------------------------------------------------------------- compare_heads


@pytest.mark.parametrize("name", compare_heads.HEADS)
def test_every_published_head_trains_features_and_itself(name: str):
    torch.manual_seed(0)
    head = compare_heads.HEADS[name](7)
    features = torch.randn(20, compare_losses.FEATURES, requires_grad=True)
    labels = torch.arange(20) % 7
    optimizer = torch.optim.Adam([features, *head.parameters()], lr=0.05)
    losses = []
    for _ in range(60):
        loss = head(features, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.isfinite().all() for p in head.parameters())


@pytest.mark.slow
def test_compare_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--out", str(tmp_path), "--runs", "1", "--epochs", "2", "--device", "cpu"]
    runs = compare_heads.main([*arguments, "--images", "700"])
    assert [r.head for r in runs] == list(compare_heads.HEADS)
    assert is_figure(tmp_path / "compare_heads.png")
    table = rows_of(tmp_path / "summary.csv")
    for run, row in zip(runs, table, strict=True):
        assert 0.5 < run.unseen <= 1 and 0.6 < run.seen <= 1 and np.isfinite(run.loss) and run.ms > 0
        assert row["head"] == run.head
        assert float(row["loss"]) == pytest.approx(run.loss, rel=1e-5)
    assert (tmp_path / "summary.md").read_text().count("\n") == 2 + len(runs)
    assert all(f"{run.head:20}" in capsys.readouterr().out for run in runs[:1])
