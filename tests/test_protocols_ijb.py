"""IJB 1:1: pooling and rates against a plain implementation of InsightFace's code; its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fuzz.readers import assert_contract
from sklearn.preprocessing import normalize

from normface_ext import evaluation as ev


def drawn(seed: int, images: int = 300) -> tuple[np.ndarray, ev.TemplateImages, ev.TemplatePairs]:
    random = np.random.default_rng(seed)
    template = random.integers(0, 40, images) * 7 + 3  # numbers with gaps, in no order
    media = random.integers(0, 6, images)
    person = template % 10
    centres = random.normal(size=(300, 16))
    features = centres[person] + random.normal(size=(images, 16))
    numbers = np.unique(template)
    first, second = (random.choice(numbers, 500) for _ in range(2))
    return (
        features,
        ev.TemplateImages(template, media),
        ev.TemplatePairs(first, second, first % 10 == second % 10),
    )


def published(features: np.ndarray, template: np.ndarray, media: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.unique(template)
    pooled = np.zeros((len(numbers), features.shape[1]))
    for at, number in enumerate(numbers):
        inside = np.where(template == number)[0]
        parts = []
        for medium in np.unique(media[inside]):
            parts.append(np.mean(features[inside][media[inside] == medium], axis=0))
        pooled[at] = np.sum(parts, axis=0)
    return numbers, normalize(pooled)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_templates_are_pooled_as_published(seed: int, unit: bool, weighted: bool):
    features, images, pairs = drawn(seed)
    weights = np.random.default_rng(9).random(len(features)) if weighted else None
    taken = normalize(features) if unit else features
    taken = taken * weights[:, None] if weighted else taken
    numbers, truth = published(taken, images.template, images.media)
    found, pooled = ev.pool_templates(features, images, weights=weights, normalize_images=unit)
    np.testing.assert_array_equal(found, numbers)
    np.testing.assert_allclose(pooled, truth, atol=1e-12)
    rows = [np.searchsorted(numbers, column) for column in (pairs.first, pairs.second)]
    scores = np.sum(truth[rows[0]] * truth[rows[1]], axis=1)
    for block in (1, 7, 499, 10_000):
        result = ev.ijb_protocol(features, images, pairs, weights=weights, normalize_images=unit, block=block)
        np.testing.assert_allclose(result.scores, scores, atol=1e-12)
    for how in ("below", "nearest"):
        np.testing.assert_array_equal(
            result.tar(how=how), ev.tar_at_far(result.scores, pairs.same, ev.IJB_RATES, how=how)
        )
    assert result.roc().auc > 0.6


def test_by_hand():
    """Template 1: a video of two frames, and one image. Template 2: one image."""
    images = ev.TemplateImages([1, 1, 1, 2], [5, 5, 6, 5])
    features = np.array([[2.0, 0.0], [0.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
    numbers, pooled = ev.pool_templates(features, images)
    assert numbers.tolist() == [1, 2]
    np.testing.assert_allclose(pooled, np.array([[1, 2], [1, 0]]) / np.array([[5**0.5], [1]]))
    _, weighted = ev.pool_templates(features, images, weights=[1, 0, 0, 2])
    np.testing.assert_allclose(weighted, [[1, 0], [1, 0]])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weights": [1, 1, 1]}, r"`weights` \[4\], each >= 0"),
        ({"weights": [1, 1, 1, -1]}, r"`weights` \[4\], each >= 0, got \[4\], -1 the smallest"),
        ({"weights": [1, 1, 1, np.nan]}, "`weights` without NaN"),
        ({"features": np.ones((3, 2))}, "`features` of 4 images, got 3"),
        ({"features": np.full((4, 2), np.inf)}, "`features` to be finite"),
        (
            {"pairs": ([1, 1], [2, 9], [0, 1])},
            "expected images of every template, got none of 9, `second` of pair 1",
        ),
        ({"block": 0}, "`block`"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], sentence: str):
    given: dict[str, object] = {"features": np.ones((4, 2)), "pairs": ([1], [2], [1]), **change}
    pairs = ev.TemplatePairs(*given.pop("pairs"))
    with pytest.raises(ValueError, match=sentence):
        ev.ijb_protocol(given.pop("features"), ev.TemplateImages([1, 1, 1, 2], [5, 5, 6, 5]), pairs, **given)


def test_columns_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"TemplateImages: expected columns of one length >= 1"):
        ev.TemplateImages([1, 2], [1])
    with pytest.raises(ValueError, match=r"TemplateImages: expected columns of one length >= 1"):
        ev.TemplateImages([], [])
    with pytest.raises(ValueError, match=r"TemplatePairs: expected columns of one length"):
        ev.TemplatePairs([1, 2], [1, 2], [True])
    with pytest.raises(ValueError, match=r"TemplatePairs: expected `first` to be a row of whole numbers"):
        ev.TemplatePairs([1.5], [1], [True])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("sign", [" ", "\t", ",", "   "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_are_read(tmp_path: Path, sign: str, end: str, encoding: str):
    path = tmp_path / "list.txt"
    rows = [("1.jpg", 1, 69544), ("2.jpg", 1, 3720), ("3.jpg", 17, 11)]
    path.write_bytes(end.join(sign.join(map(str, row)) for row in rows).encode(encoding))
    images = ev.read_ijb_templates(path)
    assert images.names == ("1.jpg", "2.jpg", "3.jpg") and images.template.tolist() == [1, 1, 17]
    assert images.media.tolist() == [69544, 3720, 11]
    pairs = [(1, 11065, 1), (1, 17, 0), (2**40, 3, 1)]
    path.write_bytes((end.join(sign.join(map(str, row)) for row in pairs) + end).encode(encoding))
    found = ev.read_ijb_pairs(path)
    assert list(zip(found.first, found.second, found.same, strict=True)) == pairs
    path.write_bytes(end.join(["1.jpg 3.5 4 0.9996", "2.jpg 1 2 1", "3.jpg 1 2 0"]).encode(encoding))
    assert ev.read_ijb_scores(path).tolist() == [0.9996, 1, 0]


def test_long_lists_of_pairs_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(0)
    table = np.c_[random.integers(0, 1 << 20, (200_000, 2)), random.integers(0, 2, 200_000)]
    path = tmp_path / "pairs.txt"
    np.savetxt(path, table, "%d")
    monkeypatch.setattr("fuzz.readers.MULTIPLE", 5)
    found = assert_contract(ev.read_ijb_pairs, path)
    np.testing.assert_array_equal(np.c_[found.first, found.second, found.same], table)
    with path.open("a") as file:
        file.write("1 2\n")
    with pytest.raises(
        ValueError, match=r"pairs\.txt:200001: expected 'template template same', same 0 or 1"
    ):
        ev.read_ijb_pairs(path)


@pytest.mark.parametrize(
    ("reader", "text", "sentence"),
    [
        ("templates", "", ": expected at least one image"),
        ("templates", "1.jpg 1 2\n2.jpg 1\n", ":2: expected 'image template media', got 2 words"),
        ("templates", "1.jpg 1.0 2\n", ":1: expected a template number, got '1.0'"),
        ("templates", "1.jpg 1 -2\n", ":1: expected a media number, got '-2'"),
        ("pairs", "", ": expected at least one pair"),
        ("pairs", "1 2 1\n1 2 2\n", ":2: expected 'template template same', same 0 or 1, got '1 2 2'"),
        ("pairs", "1 2 1\n1 2 1 1\n", ":2: expected 'template template same'"),
        ("pairs", f"1 {1 << 63} 1\n", ":1: expected a template number"),
        ("pairs", "1" * 20_000, ":1: expected a line of at most"),
        ("scores", "1.jpg nan\n", ":1: expected a detection score >= 0 as the last word, got 'nan'"),
        ("scores", "1.jpg -1\n", ":1: expected a detection score"),
        ("scores", "1.jpg 1e999\n", ":1: expected a detection score"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, reader: str, text: str, sentence: str):
    path = tmp_path / "list.txt"
    path.write_text(text)
    error = assert_contract(getattr(ev, f"read_ijb_{reader}"), path)
    assert isinstance(error, ValueError) and f"list.txt{sentence}" in str(error), error
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        getattr(ev, f"read_ijb_{reader}")(tmp_path / "gone.txt")
