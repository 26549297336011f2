"""read_pairs reads every layout, separator and encoding as what it says, or says what would settle it."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
from fuzz.readers import assert_contract

from normface_ext import evaluation as ev

#: (first, second, same) of rows of NAMES.
PLAIN = [f"p{i // 2}/{i % 2 + 1}.jpg" for i in range(8)]
SPACED = [f"Ann Lee {i // 2}/image, {i % 2 + 1}.jpg" for i in range(8)]
LFW_NAMES = [f"P_{i // 2}/P_{i // 2}_{i % 2 + 1:04d}.jpg" for i in range(8)]
TRIPLES = [(0, 1, 1), (2, 3, 1), (0, 3, 0), (2, 5, 0), (4, 5, 1), (6, 7, 1), (4, 7, 0), (6, 1, 0)]
SIGNS = {"tab": "\t", "comma": ",", "semicolon": ";", "blank": " "}


def plain(pairs: ev.Pairs) -> list[list[object]]:
    return [column.tolist() for column in (pairs.first, pairs.second, pairs.same, pairs.fold)]


TRUTH = plain(ev.Pairs.in_folds(*map(list, zip(*TRIPLES, strict=True)), 2))


def joined(cells: list[object], separator: str) -> str:
    if separator == "blank":
        return " ".join(f'"{c}"' if " " in str(c) else str(c) for c in cells)
    out = io.StringIO()
    csv.writer(out, delimiter=SIGNS[separator], lineterminator="").writerow(cells)
    return out.getvalue()


def lines_of(layout: str, separator: str, names: list[str]) -> list[str]:
    rows: list[list[object]] = []
    for i, j, same in TRIPLES:
        if layout == "image image same":
            rows.append([names[i], names[j], same])
        elif layout == "image image true":
            rows.append([names[i], names[j], bool(same)])
        elif layout == "image image 1.0":
            rows.append([names[i], names[j], float(same)])
        elif layout == "image image -1":
            rows.append([names[i], names[j], 2 * same - 1])
        elif layout == "same image image":
            rows.append([same, names[i], names[j]])
        elif layout == "two lines":
            rows += [[names[i], same], [names[j], same]]
        elif layout == "header":
            rows = rows or [["Id", "Is_Same", "image 1", "image-2"]]
            rows.append([len(rows), same, names[i], names[j]])
        else:
            person, image = f"P_{i // 2}", i % 2 + 1
            rows.append([person, image, *([] if same else [f"P_{j // 2}"]), j % 2 + 1])
    if layout == "lfw":
        rows = [[2, 2], *rows]
    if layout == "lfw of kaggle":
        rows = [["name", "imagenum1", "imagenum2", ""], *([*row, ""][:4] for row in rows)]
    return [joined(row, separator) for row in rows]


LAYOUTS = (
    "image image same", "image image true", "image image -1", "image image 1.0", "same image image",
    "two lines", "header", "lfw", "lfw without header", "lfw of kaggle",
)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "separator"),
    # Kaggle's has empty cells, and between blanks no cell is empty.
    [(layout, sign) for layout in LAYOUTS for sign in SIGNS if (layout, sign) != ("lfw of kaggle", "blank")],
)
@pytest.mark.parametrize("images", ["plain", "spaced"])
def test_every_layout_between_every_separator(tmp_path: Path, layout: str, separator: str, images: str):
    names = LFW_NAMES if "lfw" in layout else {"plain": PLAIN, "spaced": SPACED}[images]
    path = tmp_path / "pairs.txt"
    text = "\n".join(lines_of(layout, separator, names)) + "\n"
    path.write_text(text)
    found = ev.read_pairs(path, names, folds=2)
    assert plain(found.pairs) == TRUTH and found.names == tuple(names)
    assert "8 pairs, 4 of them same" in found.found
    # Without names the list makes its own, in the order in which they occur.
    collected = ev.read_pairs(path, folds=2)
    order = np.array([names.index(name) for name in collected.names])
    again = (order[collected.pairs.first], order[collected.pairs.second], collected.pairs.same)
    assert [column.tolist() for column in again] == TRUTH[:3]
    assert list(dict.fromkeys(order.tolist())) == order.tolist()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("encoding", "given"),
    [("utf-8", None), ("utf-8-sig", None), ("utf-16", None), ("utf-8-sig", "utf-8"), ("latin-1", "latin-1"),
     ("utf-16-le", "utf-16-le"), ("cp1252", "cp1252")],
)  # fmt: skip
def test_encodings(tmp_path: Path, encoding: str, given: str | None, end: str):
    names = [f"José Muñoz/{i}.jpg" for i in range(8)]
    path, listed = tmp_path / "pairs.txt", tmp_path / "names.txt"
    path.write_bytes((end.join(lines_of("image image same", "tab", names)) + end).encode(encoding))
    listed.write_bytes((end.join(names) + end).encode(encoding))
    assert plain(ev.read_pairs(path, names, folds=2, encoding=given).pairs) == TRUTH
    found = ev.read_pairs(path, listed, folds=2, encoding=given)
    assert plain(found.pairs) == TRUTH and found.names == tuple(names)
    assert ev.read_names(listed, encoding=given) == names


def test_an_encoding_that_cannot_be_told_is_asked_for(tmp_path: Path):
    path = tmp_path / "pairs.txt"
    path.write_bytes("José/1.jpg José/2.jpg 1\n".encode("latin-1"))
    error = assert_contract(ev.read_pairs, path)
    sentence = r"pairs\.txt:1: expected UTF-8 text, got other bytes .*`encoding` names another"
    assert re.search(sentence, str(error))
    for encoding in ("ascii", "utf-8"):
        with pytest.raises(ValueError, match=rf"pairs\.txt:1: expected {encoding.upper()} text"):
            ev.read_pairs(path, encoding=encoding)
    for encoding in ("no such", "rot13", "base64", "", 3):
        with pytest.raises(ValueError, match="read_pairs: expected `encoding` to be the name of one"):
            ev.read_pairs(path, encoding=encoding)


@pytest.mark.parametrize("names", [PLAIN, SPACED], ids=["plain", "spaced"])
@pytest.mark.parametrize("layout", ["image image same", "same image image"])
def test_a_fold_column(tmp_path: Path, layout: str, names: list[str]):
    path = tmp_path / "pairs.txt"
    path.write_text("\n".join(f"{line}\t{7 + i}" for i, line in enumerate(lines_of(layout, "tab", names))))
    found = ev.read_pairs(path, names)
    assert found.pairs.fold.tolist() == list(range(7, 15)) and "8 folds" in found.found


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("separator", SIGNS)
def test_two_columns_and_a_file_of_labels(tmp_path: Path, separator: str, header: bool):
    path, labels = tmp_path / "pairs.txt", tmp_path / "labels.txt"
    rows = [["img1", "img2"]] * header + [[SPACED[i], SPACED[j]] for i, j, _ in TRIPLES]
    path.write_text("\n".join(joined(row, separator) for row in rows))
    same = [same for *_, same in TRIPLES]
    for values in (same, [bool(v) for v in same], [2 * v - 1 for v in same]):
        labels.write_text("\n".join([*["Is_Same"] * header, *map(str, values)]) + "\n")
        assert plain(ev.read_pairs(path, SPACED, labels=labels, folds=2).pairs) == TRUTH
    assert plain(ev.read_pairs(path, SPACED, labels=np.array(same), folds=2).pairs) == TRUTH
    for values in (same[:7], [*same, 1]):
        sentence = rf"pairs\.txt.*: expected {len(values)} pairs, as many as `labels`, got"
        with pytest.raises(ValueError, match=sentence):
            ev.read_pairs(path, SPACED, labels=values)
    labels.write_text("1\n0\n2\n")
    with pytest.raises(ValueError, match=r"labels\.txt:3: expected same to be 0 or 1, got 2"):
        ev.read_pairs(path, SPACED, labels=labels)


def test_columns_are_named(tmp_path: Path):
    path = tmp_path / "pairs.csv"
    rows: list[list[object]] = [["age gap", "probe", "reference", "y", "weight"]]
    rows += [[30 + i, PLAIN[i], PLAIN[j], same, 0.5] for i, j, same in TRIPLES]
    path.write_text("\n".join(joined(row, "comma") for row in rows))
    columns: dict[str, int | str] = {"first": "Probe", "second": "reference", "same": "y"}
    assert plain(ev.read_pairs(path, PLAIN, columns=columns, folds=2).pairs) == TRUTH
    with pytest.raises(ValueError, match=r"pairs\.csv:1: expected .*`columns` what a header has"):
        ev.read_pairs(path, PLAIN)
    with pytest.raises(ValueError, match=r"pairs\.csv:1: expected a header with one column for `same`"):
        ev.read_pairs(path, PLAIN, columns={**columns, "same": "label"})
    path.write_text("\n".join(joined(row, "comma") for row in rows[1:]))
    numbers: dict[str, int | str] = {"first": 1, "second": 2, "same": 3}
    assert plain(ev.read_pairs(path, PLAIN, columns=numbers, folds=2).pairs) == TRUTH
    assert ev.read_pairs(path, PLAIN, columns={**numbers, "fold": 0}).pairs.fold[0] == 30


BAD_COLUMNS = [{}, {"first": 0}, {"first": 0, "second": 1, "same": "y"}, {"first": 0, "second": 0, "same": 1},
               {"first": -1, "second": 0, "same": 1}, {"first": 0, "second": 1, "same": 2, "x": 3},
               ["first", "second", "same"], {"first": True, "second": 0, "same": 2}]  # fmt: skip


@pytest.mark.parametrize("columns", BAD_COLUMNS, ids=range(len(BAD_COLUMNS)))
def test_columns_that_say_too_little_are_refused(tmp_path: Path, columns: object):
    (tmp_path / "pairs.txt").write_text("a b 1\n")
    with pytest.raises(ValueError, match="read_pairs: expected `columns` to say of first, second, same"):
        ev.read_pairs(tmp_path / "pairs.txt", columns=columns)


@pytest.mark.parametrize(
    ("text", "names", "settled", "line"),
    [
        # Images called 0, 1, 2: same may be the first word or the last.
        ("0 1 1\n1 0 1\n1 0 0\n", ["0", "1"], {"layout": "same image image"}, 1),
        ("0 1 1\n1 0 1\n1 0 0\n", ["0", "1"], {"columns": {"first": 1, "second": 2, "same": 0}}, 1),
        ("1 1 1\n0 1 0\n1 0 0\n", ["0", "1"], {"layout": "image image same"}, 2),
    ],
)  # fmt: skip
def test_what_may_mean_two_things_is_not_guessed(
    tmp_path: Path, text: str, names: list[str], settled: dict[str, object], line: int
):
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    sentence = rf"pairs\.txt:{line}: expected lines with one meaning, got two: .*`layout` or `columns` settle"
    with pytest.raises(ValueError, match=sentence):
        ev.read_pairs(path, names)
    assert len(ev.read_pairs(path, names, **settled).pairs) == 3


def test_one_line_that_tells_is_enough(tmp_path: Path):
    """Even at the end of the file."""
    path = tmp_path / "pairs.txt"
    path.write_text("0 1 1\n1 0 1\n" * 500 + "2 1 1\n")
    assert ev.read_pairs(path, ["0", "1", "2"]).pairs.first[-1] == 2
    path.write_text("0 1 1\n1 0 1\n" * 500 + "1 2 1\n")
    with pytest.raises(ValueError, match=r"pairs\.txt:1: expected lines with one meaning"):
        ev.read_pairs(path, ["0", "1", "2"])
    path.write_text("0 1 1\n1 0 1\n" * 500 + "1 0 2\n")
    pairs = ev.read_pairs(path, ["0", "1", "2"]).pairs
    assert (pairs.first[-1], pairs.second[-1], pairs.same[-1]) == (0, 2, True)


def test_names_apart_only_by_the_separator(tmp_path: Path):
    path = tmp_path / "pairs.txt"
    path.write_text("a x,b 1,1\nc,d,0\n")
    found = ev.read_pairs(path)
    assert found.names == ("a x", "b 1", "c", "d")
    path.write_text("a;b,c;d,1\ne;f,g;h,0\n")  # between semicolons: three cells, and the last no answer
    assert ev.read_pairs(path).names == ("a;b", "c;d", "e;f", "g;h")
    path.write_text("a,1 b,1 1\n")  # blanks: images a,1 and b,1; commas: 'a', '1 b', '1 1'
    assert ev.read_pairs(path).names == ("a,1", "b,1")
    path.write_text("a;x,b;1,1\n")
    with pytest.raises(ValueError, match="expected same to be 0 or 1"):
        ev.read_pairs(path, separator="semicolon")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", ": expected at least one pair, got none"),
        ("# nothing\n\n", ": expected at least one pair, got none"),
        ("p0/1.jpg p0/2.jpg 1\np0/1.jpg p9/1.jpg 0\n", ":2: expected a name of a feature row, got 'p9/1"),
        ("p0/1.jpg p0/2.jpg 1\np0/1.jpg p1/1.jpg\n", ":2: expected .*got 2 words"),
        ("p0/1.jpg p0/2.jpg 1\np0/1.jpg p1/1.jpg 2\n", ":2: expected same to be 0 or 1, got 2"),
        ("p0/1.jpg p0/2.jpg 1\np0/1.jpg p1/1.jpg -1\np0/1.jpg p1/1.jpg 0\n", ":3: expected same to"),
        ("p0/1.jpg p0/2.jpg true\np0/1.jpg p1/1.jpg 0\n", ":2: expected same to be 0 or 1, got 0"),
        ("p0/1.jpg p0/2.jpg 1 3\np0/1.jpg p1/1.jpg 0\n", ":2: expected 4 words as .*, got 3"),
        ("p0/1.jpg 1\np0/2.jpg 0\n", ":2: expected the same label as on the line before"),
        ("p0/1.jpg 1\np0/2.jpg 1\np1/1.jpg 0\n", ":3: expected a second image of this pair on the next line"),
        ('"p0/1.jpg p0/2.jpg 1\n', ":1: expected "),
    ],
)
def test_lists_that_are_wrong_are_named(tmp_path: Path, text: str, sentence: str):
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    error = assert_contract(lambda path: ev.read_pairs(path, PLAIN), path)
    assert isinstance(error, ValueError) and re.search(rf"pairs\.txt{sentence}", str(error)), error


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        *(
            (f"{word}_1", f"{word} 2", "label")
            for word in ("image", "IMG", "path", "file", "filename", "name", "id")
        ),
        ("img_a", "img_b", "is_same"),
        ("A", "B", "y"),
        ("left", "right", "Labels"),
    ],
)
@pytest.mark.parametrize("fold", [True, False])
def test_columns_by_the_names_people_give_them(
    tmp_path: Path, first: str, second: str, same: str, fold: bool
):
    path = tmp_path / "pairs.csv"
    rows = [[first, second, same, *["fold"] * fold]]
    rows += [[SPACED[i], SPACED[j], str(s), *["01"[k % 2]] * fold] for k, (i, j, s) in enumerate(TRIPLES)]
    path.write_text("\n".join(joined(row, "comma") for row in rows))
    found = ev.read_pairs(path, SPACED, folds=2).pairs
    assert [*zip(found.first, found.second, found.same.astype(int), strict=True)] == [
        tuple(t) for t in TRIPLES
    ]
