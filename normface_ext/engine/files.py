"""What every reader of a file owes: an error that names the file, in one short sentence.

A broken file ends in a ValueError or an OSError. Readers say themselves what they expected and what they
found; ``reading`` stands around parsers of other projects, whose errors are of any kind and any length.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

#: The most characters of a sentence, and of a list of sentences.
LONGEST, LONGEST_LIST = 300, 2000


def clip(text: str, most: int = LONGEST) -> str:
    """The text on one line; where it is longer than ``most``, without its middle."""
    if len(text) > most:
        text = f"{text[: most * 2 // 3 - 3]} ... {text[len(text) - most // 3 + 2 :]}"
    return " ".join(text.splitlines())


def quoted(value: str | bytes, most: int = 60) -> str:
    """A value out of a file for a sentence, cut to ``most`` characters."""
    cut = len(value) > most
    return f"{value[:most]!r}" + (
        f"... ({len(value)} {'bytes' if isinstance(value, bytes) else 'characters'})" * cut
    )


def file_name(path: str | os.PathLike[str]) -> str:
    """A path as it stands in messages: its end, where it is long, and printable."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return clip(text if len(text) <= 120 else f"...{text[-117:]}", 120)


def listing(head: str, sentences: Sequence[str], more: int, end: str = "") -> str:
    """A message of one line for each sentence, and how many there are beyond those that fit."""
    lines, left = [clip(head)], LONGEST_LIST - len(clip(head)) - len(end) - len("\n... and 1000000 more")
    for i, sentence in enumerate(sentences):
        line = clip(sentence)
        left -= len(line) + 1
        if left < 0:
            more += len(sentences) - i
            break
        lines.append(line)
    return "\n".join(lines + [f"... and {more} more"] * (more > 0)) + end


def read_bytes(path: str | os.PathLike[str], most: int, expected: str) -> bytes:
    """A whole file of at most ``most`` bytes, which is ``expected``.

    Raises:
        OSError: as ``open`` has it.
        ValueError: a larger file; nothing of it is kept.
    """
    where = file_name(path)
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            regular = stat.S_ISREG(state.st_mode)
            if regular and state.st_size > most:
                raise ValueError(f"{where}: expected {expected} of at most {most} bytes, got {state.st_size}")
            data = file.read(-1 if regular else most + 1)
    except OSError as error:
        raise OSError(error.errno, error.strerror, where) from error
    if len(data) > most:
        raise ValueError(f"{where}: expected {expected} of at most {most} bytes, got more")
    return data


@contextmanager
def reading(where: str, expected: str) -> Iterator[None]:
    """Around a parser of another project: whatever it raises becomes a ValueError "where: expected ...".

    An OSError of the operating system, which names its file, stays what it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(
            clip(f"{where}: expected {expected}, got {type(error).__name__}: {error}")
        ) from error
