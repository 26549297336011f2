"""Text files line by line: in bounded memory, with an error that names file and line."""

from __future__ import annotations

import codecs
import io
import os
import re
from collections.abc import Iterator

from ..engine.arguments import INT64_MAX
from ..engine.files import clip, file_name, quoted

#: Characters of a line: room for two paths. More is no list of pairs or names.
LONGEST_LINE = 1 << 14
_DIGITS = re.compile(r"[0-9]{1,19}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def refused(where: str, expected: str, got: str) -> ValueError:
    """ "where: expected ..., got ..." on one short line."""
    return ValueError(clip(f"{where}: expected {expected}, got {got}"))


def lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """("file:line", text) for every line with something on it, blanks at its ends cut off.

    UTF-8, or UTF-16 with its mark, as Windows writes it; a byte order mark is no text. A line ends with LF,
    CR LF or CR and with nothing else, and has no control characters.

    Raises:
        OSError: as ``open`` has it.
        ValueError: other bytes, a control character, a line of more than LONGEST_LINE characters.
    """
    where = file_name(path)
    try:
        with open(path, "rb") as raw:
            wide = raw.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            encoding = "utf-16" if wide else "utf-8-sig"
            # Bytes that are no text become surrogates, so that they are found on their own line.
            with io.TextIOWrapper(raw, encoding, "surrogateescape") as file:
                number = 0
                while True:
                    number += 1
                    at = f"{where}:{number}"
                    try:
                        line = file.readline(LONGEST_LINE + 1)
                        line.encode()
                    except UnicodeError:
                        raise refused(at, "UTF-8 text", "other bytes on or after this line") from None
                    if not line:
                        return
                    if len(line) > LONGEST_LINE:
                        raise refused(at, f"a line of at most {LONGEST_LINE} characters", "a longer one")
                    line = line.removesuffix("\n")
                    control = _CONTROL.search(line)
                    if control:
                        raise refused(at, "text", f"the control character {control[0]!r}")
                    line = line.strip(" \t")
                    if line:
                        yield at, line
    except OSError as error:
        raise OSError(error.errno, error.strerror, where) from error


def words_of(line: str) -> list[str]:
    """The cells of a line with commas, the words of one without; a cell may be empty, a word is not."""
    if "," in line:
        return [cell.strip(" \t") for cell in line.split(",")]
    return re.split(r"[ \t]+", line)


def whole(where: str, word: str, meaning: str) -> int:
    """A number >= 0 in plain digits that an int64 holds."""
    if _DIGITS.fullmatch(word) and int(word) <= INT64_MAX:
        return int(word)
    raise refused(where, meaning, f"{quoted(word, 40)}; what is read is digits alone, below 2^63")
