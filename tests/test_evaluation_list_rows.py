"""read_pairs with row numbers, with two lines per pair, and with arguments that contradict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_evaluation_lists import PLAIN, plain

from normface_ext import evaluation as ev

QUOTED = '"0","1","1"\n"1","0","1"\n"0","1","0"\n'


def test_row_numbers_are_read_as_i_j_same(tmp_path: Path):
    path = tmp_path / "pairs.txt"
    for text in (
        "0 1 1\n1 0 1\n0, 1, 0\n",
        "i,j,same\n0,1,1\n1,0,1\n0,1,0\n",
        "0;1;1\n1;0;1\n0;1;0\n",
        QUOTED,
    ):
        path.write_text(text)
        found = ev.read_pairs(path, rows=2)
        assert plain(found.pairs)[:3] == [[0, 1, 0], [1, 0, 1], [True, True, False]] and found.names == ()
        assert plain(ev.read_pairs(path).pairs) == plain(found.pairs)
    path.write_text("0 1 1\n1 2 1\n")
    with pytest.raises(ValueError, match=r"pairs\.txt:2: expected a row number in \[0, 2\), got 2"):
        ev.read_pairs(path, rows=2)
    path.write_text("0 a.jpg 1\n")
    with pytest.raises(ValueError, match=r"pairs\.txt:1: expected a whole number, got 'a.jpg'"):
        ev.read_pairs(path)


@pytest.mark.parametrize("seed", range(20))
def test_lists_of_row_numbers_have_one_meaning_whatever_the_numbers(tmp_path: Path, seed: int):
    random = np.random.default_rng(seed)
    count, top = int(random.integers(1, 60)), int(random.choice([2, 3, 40, 1 << 40]))
    table = np.c_[random.integers(0, top, (count, 2)), random.integers(0, 2, count)]
    if seed % 2:
        table = np.c_[table, random.integers(0, 10, count)]
    path = tmp_path / "pairs.txt"
    path.write_text("".join(" \t,"[seed % 3].join(map(str, row)) + "\n" for row in table.tolist()))
    found = ev.read_pairs(path, folds=3)
    assert plain(found.pairs) == plain(ev.read_index_pairs(path, 3)) and found.names == ()
    np.testing.assert_array_equal(
        np.c_[found.pairs.first, found.pairs.second, found.pairs.same], table[:, :3]
    )


def test_two_lines_per_pair_with_numbers_for_one_person(tmp_path: Path):
    """CALFW's way: same pairs first, any number above 0 on both of their lines."""
    path = tmp_path / "pairs_CALFW.txt"
    rows = [(PLAIN[2 * p + i], p + 1) for p in range(4) for i in (0, 1)]
    rows += [(PLAIN[2 * p + 2 * i], 0) for p in range(3) for i in (0, 1)] + [(PLAIN[0], 0), (PLAIN[7], 0)]
    path.write_text("".join(f"{name} {label}\n" for name, label in rows))
    pairs = ev.read_pairs(path, PLAIN, folds=2).pairs
    assert pairs.same.tolist() == [True] * 4 + [False] * 4 and pairs.fold.tolist() == [0, 0, 1, 1] * 2
    assert pairs.first.tolist() == [0, 2, 4, 6, 0, 2, 4, 0] and pairs.second.tolist() == [
        1,
        3,
        5,
        7,
        2,
        4,
        6,
        7,
    ]
    # Images and their people, two of each, are no pairs.
    for start in (0, 1):
        path.write_text("".join(f"{name} {row // 2 + start}\n" for row, name in enumerate(PLAIN)))
        with pytest.raises(
            ValueError, match=r"pairs_CALFW\.txt: expected as many pairs with 0 as with another"
        ):
            ev.read_pairs(path, PLAIN)
    path.write_text("a.jpg 3\nb.jpg 4\n")
    with pytest.raises(
        ValueError, match=r"pairs_CALFW\.txt:2: expected the same label as on the line before"
    ):
        ev.read_pairs(path)


def test_a_fold_without_names_is_asked_for(tmp_path: Path):
    """ "Al Gore 1 2" are two images, the same person, fold 2; or LFW's images 1 and 2 of Al Gore."""
    path = tmp_path / "pairs.txt"
    path.write_text("Al Gore 1 2\nAl Bo 0 3\n")
    with pytest.raises(ValueError, match=r"pairs\.txt:1: expected .*`columns`"):
        ev.read_pairs(path)
    columns = {"first": 0, "second": 1, "same": 2, "fold": 3}
    assert ev.read_pairs(path, columns=columns).pairs.fold.tolist() == [2, 3]
    assert ev.read_pairs(path, ["Al", "Gore", "Bo"]).pairs.fold.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Ann Lee/1.jpg Ann Lee/2.jpg 1\n", "expected 'image image same', got 5 words"),
        ("a.jpg b.jpg\n", "`labels` same of two columns"),
        ("0 1\n", "expected 'i j same' or 'i j same fold', got 2 words.*`labels` same of two columns"),
        ("left_image,right_image,y\na,b,1\n", "expected same to be 0 or 1, got 'y'.*`columns` what a header"),
        ('a"b.jpg c.jpg 1\n', 'expected a name with blanks in one pair of "'),
    ],
)
def test_the_sentence_says_what_would_settle_it(tmp_path: Path, text: str, sentence: str):
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"pairs\.txt:1: .*{sentence}"):
        ev.read_pairs(path)


def test_arguments_that_contradict_are_refused(tmp_path: Path):
    path = tmp_path / "pairs.txt"
    path.write_text("0 1 1\n")
    for arguments, sentence in (
        ({"names": ["a"], "rows": 2}, "`names` or `rows`"),
        ({"layout": "pairs"}, "`layout` to be one of"),
        ({"separator": "|"}, "`separator` to be one of"),
        ({"rows": 2, "layout": "lfw"}, "`names` for layout 'lfw'"),
        ({"folds": 0}, "`folds`"),
        ({"rows": -1}, "`rows`"),
        ({"labels": [2]}, "`same`"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ev.read_pairs(path, **arguments)
