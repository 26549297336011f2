"""Text files line by line: in bounded memory, with an error that names file and line."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Callable, Iterator

from ..engine.arguments import INT64_MAX, shown
from ..engine.files import clip, file_name, quoted

#: Characters of a line: room for two paths. More is no list of pairs or names.
LONGEST_LINE = 1 << 14
_DIGITS = re.compile(r"[0-9]{1,19}")
#: A word between blanks, or between quotes, where a quote is written twice.
_WORD = re.compile(r'"(?:[^"]|"")*"|[^ \t"]+')
_WORDS = re.compile(rf"(?:{_WORD.pattern})(?:[ \t]+(?:{_WORD.pattern}))*")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def refused(where: str, expected: str, got: str) -> ValueError:
    """ "where: expected ..., got ..." on one short line."""
    return ValueError(clip(f"{where}: expected {expected}, got {got}"))


def text_encoding(op: str, encoding: object) -> str | None:
    """The name of an encoding of text, or None."""
    if encoding is None:
        return None
    try:
        if not isinstance(encoding, str):
            raise LookupError
        "".encode(encoding)  # LookupError too where it is none of text
        name = codecs.lookup(encoding).name
    except (LookupError, ValueError):
        raise ValueError(
            f"{op}: expected `encoding` to be the name of one, such as 'latin-1', got {shown(encoding)}"
        ) from None
    return {"utf-8": "utf-8-sig"}.get(name, name)


def encoding_of(path: str | os.PathLike[str]) -> str:
    """UTF-16 if the file starts with its mark, else UTF-8, with or without a mark."""
    try:
        with open(path, "rb") as raw:
            wide = raw.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    except OSError as error:
        raise OSError(error.errno, error.strerror, file_name(path)) from error
    return "utf-16" if wide else "utf-8-sig"


def lines(path: str | os.PathLike[str], encoding: str | None = None) -> Iterator[tuple[str, str]]:
    """("file:line", text) for every line with something on it, blanks at its ends cut off.

    UTF-8, or UTF-16 with its mark, as Windows writes it, if no other encoding is given; a byte order mark is
    no text. A line ends with LF, CR LF or CR and with nothing else, and has no control characters.

    Raises:
        OSError: as ``open`` has it.
        ValueError: other bytes, a control character, a line of more than LONGEST_LINE characters.
    """
    where = file_name(path)
    known = encoding_of(path) if encoding is None else encoding
    settles = "; `encoding` names another" if encoding is None else ""
    kind = known.removesuffix("-sig").upper()
    try:
        # Bytes that are no text become surrogates, so that they are found on their own line.
        errors = "surrogateescape" if encoding is None else "strict"
        with open(path, "rb") as raw, io.TextIOWrapper(raw, known, errors) as file:
            number = 0
            while True:
                number += 1
                at = f"{where}:{number}"
                try:
                    line = file.readline(LONGEST_LINE + 1)
                    line.encode()
                except UnicodeError:
                    raise refused(at, f"{kind} text", f"other bytes on or after this line{settles}") from None
                if not line:
                    return
                if len(line) > LONGEST_LINE:
                    raise refused(at, f"a line of at most {LONGEST_LINE} characters", "a longer one")
                line = line.removesuffix("\n")
                control = _CONTROL.search(line)
                if control:
                    wide = settles if control[0] == "\0" else ""  # UTF-16 without its mark is full of them
                    raise refused(at, "text", f"the control character {control[0]!r}{wide}")
                line = line.strip(" \t")
                if line:
                    yield at, line
    except OSError as error:
        raise OSError(error.errno, error.strerror, where) from error


def words_of(where: str, line: str) -> list[str]:
    """The cells of a line with commas, the words of one without; a cell may be empty, a word is not."""
    if "," in line:
        return [cell.strip(" \t") for cell in line.split(",")]
    return re.split(r"[ \t]+", line)


def _cells(sign: str) -> Callable[[str, str], list[str]]:
    def split(where: str, line: str) -> list[str]:
        if '"' not in line:
            return [cell.strip(" \t") for cell in line.split(sign)]
        try:  # "a ""b"", c" as CSV has it
            rows = list(csv.reader([line], delimiter=sign, skipinitialspace=True, strict=True))
        except csv.Error as error:
            raise refused(where, "quotes as CSV has them", str(error)) from None
        return [cell.strip(" \t") for cell in rows[0]]

    return split


def _blanks(where: str, line: str) -> list[str]:
    if '"' not in line:
        return re.split(r"[ \t]+", line)
    if not _WORDS.fullmatch(line):
        raise refused(where, 'a name with blanks in one pair of "', quoted(line))
    return [word[1:-1].replace('""', '"') if word[0] == '"' else word for word in _WORD.findall(line)]


#: How a line falls into cells, by name: (where, line) -> cells. All but "mixed" know double quotes.
SEPARATORS: dict[str, Callable[[str, str], list[str]]] = {
    "tab": _cells("\t"),
    "comma": _cells(","),
    "semicolon": _cells(";"),
    "blank": _blanks,
    "mixed": words_of,
}


def whole(where: str, word: str, meaning: str) -> int:
    """A number >= 0 in plain digits that an int64 holds."""
    if _DIGITS.fullmatch(word) and int(word) <= INT64_MAX:
        return int(word)
    raise refused(where, meaning, f"{quoted(word, 40)}; what is read is digits alone, below 2^63")
