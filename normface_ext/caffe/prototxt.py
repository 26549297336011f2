"""A prototxt as a message, with the line of every option.

The text is cut into words once. A walk over the words notes their lines and the options that the messages do
not have; the words that it keeps are what protobuf's own parser reads. So no text can mean one thing to the
one and another to the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..engine.files import clip, quoted
from .proto import messages, require

#: Characters of a file, twice as many as the largest released nets have. Beyond it reading takes seconds.
LONGEST_TEXT = 1 << 20
#: Layers of a net, or inputs; the deepest released ones have some thousands.
MOST_LAYERS = 5000
#: Messages within messages; Caffe's own are four deep.
DEEPEST = 30
#: Characters of a number; a float64 needs 24.
LONGEST_NUMBER = 64

#: What may follow a backslash. C++ and Python read the others (\u, \?, octal beyond a byte) differently.
_ESCAPE = r"""\\(?:[abfnrtv'"\\]|x[0-9a-fA-F]|[0-3]|[4-7](?![0-7]{2}))"""
_WORD = re.compile(
    rf"""(?P<space>[ \t\r\f\v\n]+)
    | (?P<comment>\#[^\n]*)
    | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<number>[-+]?\.?[0-9][0-9A-Za-z_.]*(?:(?<=[eE])[-+][0-9A-Za-z_.]*)?|-[A-Za-z]+)
    | (?P<string>"[^"\\\n]*(?:{_ESCAPE}[^"\\\n]*)*"|'[^'\\\n]*(?:{_ESCAPE}[^'\\\n]*)*')
    | (?P<sign>[][{{}}<>:;,])""",
    re.VERBOSE | re.ASCII,
)
_CLOSING = {"{": "}", "<": ">"}
_NO_FIELDS: Mapping[str, list[Lines]] = MappingProxyType({})


@dataclass(slots=True)
class Lines:
    """Where a message stands in its text file: its first line, and that of each of its fields."""

    line: int
    fields: Mapping[str, list[Lines]] = field(default_factory=lambda: _NO_FIELDS)
    unknown: Sequence[tuple[str, int]] = ()  # names that the message does not have

    def of(self, path: str, index: int = 0) -> int:
        """The line of the (last written) field `a.b.c`; that of the message where it is not written."""
        here = self
        for name in path.split("."):
            if name not in here.fields:
                return here.line
            here = here.fields[name][min(index, len(here.fields[name]) - 1)]
        return here.line


def parse_text(text: str, where: str) -> tuple[Any, Lines]:
    """A prototxt as (NetParameter, its lines). Unknown options are kept in the lines, not in the message.

    Raises:
        ValueError: what is no prototxt, as "file:line: what was expected".
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(
            f"{where}: expected a prototxt of at most {LONGEST_TEXT} characters, got {len(text)}"
        )
    net, text_format = messages()["NetParameter"](), require("text_format")
    walk = _Walk(_words(text.removeprefix("\ufeff"), where), where)
    lines = walk.message(net.DESCRIPTOR, 1, None)
    try:
        # Each word as a line: protobuf's errors then say which word, and no line is long.
        text_format.ParseLines(walk.kept.words, net)
    except text_format.ParseError as error:
        place = min(error.GetLine() or 1, len(walk.kept.words)) - 1
        sentence = re.sub(r"^\d+(:\d+)? : ", "", str(error))
        raise _refusal(where, walk.kept.lines[place], sentence) from error
    return net, lines


def _refusal(where: str, line: int, sentence: str) -> ValueError:
    return ValueError(clip(f"{where}:{line}: expected a prototxt, got: {sentence}"))


def _no_text(where: str, line: int, got: str) -> ValueError:
    return ValueError(f"{where}:{line}: expected a text file in UTF-8 (prototxt), got {got}")


class _Words:
    """Words and the line of each, in two lists: a pair for each would take five times the memory."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.lines: list[int] = []

    def add(self, word: str, line: int) -> None:
        self.words.append(word)
        self.lines.append(line)


def _words(text: str, where: str) -> _Words:
    """All but space and comments; at the end an empty word."""
    found, line, end = _Words(), 1, 0
    while end < len(text):
        match = _WORD.match(text, end)
        if match is None:
            got = quoted(text[end:].split("\n", 1)[0], 20)
            if text[end] in "'\"":
                raise _refusal(where, line, f"a string without its end or with an unknown escape, {got}")
            raise _no_text(where, line, got)
        word, end = match.group(), match.end()
        if match.lastgroup == "space":
            line += word.count("\n")
        elif match.lastgroup != "comment":
            if match.lastgroup == "number" and (len(word) > LONGEST_NUMBER or "_" in word):
                raise _refusal(where, line, f"no number: {quoted(word)}")
            if match.lastgroup == "string" and not word.isascii() and not _is_utf8(word):
                raise _no_text(where, line, quoted(word))
            found.add(word, line)
    found.add("", line - text.endswith("\n"))
    return found


def _is_utf8(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Walk:
    """Reads words as `name: value` and `name { ... }`; ``kept`` are those of known options."""

    def __init__(self, found: _Words, where: str) -> None:
        self.words, self.lines, self.where, self.next, self.depth = found.words, found.lines, where, 0, 0
        self.kept = _Words()

    def take(self, known: bool) -> str:
        word = self.words[self.next]
        if known:
            self.kept.add(word, self.lines[self.next])
        self.next += 1
        return word

    def skip(self, known: bool, *signs: str) -> str:
        """The next word, taken where it is one of the signs, or ""."""
        return self.take(known) if self.words[self.next] in signs else ""

    def refuse(self, sentence: str) -> ValueError:
        word, line = self.words[self.next], self.lines[self.next]
        return _refusal(self.where, line, f"{quoted(word) if word else 'the end of the text'}, {sentence}")

    def message(self, descriptor: Any, line: int, closing: str | None) -> Lines:
        """A message of a type, or of any (None), up to its closing bracket or the end of the text (None)."""
        fields: dict[str, list[Lines]] = {}
        unknown: list[tuple[str, int]] = []
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.refuse(f"more than {DEEPEST} messages within each other")
        while (word := self.words[self.next]) != (closing or ""):
            line_of_field = self.lines[self.next]
            if not (word[:1].isalpha() or word[:1] == "_"):
                wanted = "the name of an option" + (f" or {closing!r}" if closing else "")
                raise self.refuse(f"and not {wanted}")
            option = None if descriptor is None else descriptor.fields_by_name.get(word)
            known = option is not None
            if descriptor is not None and not known:
                unknown.append((word, line_of_field))
            self.take(known)
            places = self.field(option, line_of_field)
            if known:
                fields.setdefault(word, []).extend(places)
                if self.depth == 1 and len(fields[word]) > MOST_LAYERS:
                    raise ValueError(
                        f"{self.where}:{line_of_field}: expected a net with at most {MOST_LAYERS} `{word}`"
                    )
            if not self.skip(known, ","):
                self.skip(known, ";")
        self.depth -= 1
        return Lines(line, fields or _NO_FIELDS, unknown or ())

    def field(self, option: Any, line: int) -> list[Lines]:
        """What follows an option's name: its value, or a list of values."""
        known = option is not None
        self.skip(known, ":")
        if not self.skip(known, "["):
            return [self.value(option, known, line)]
        places = []
        while not self.skip(known, "]"):
            places.append(self.value(option, known, self.lines[self.next]))
            self.skip(known, ",")
        return places

    def value(self, option: Any, known: bool, line: int) -> Lines:
        child = option.message_type if known else None
        if opening := self.skip(known, *_CLOSING):
            lines = self.message(child, line, _CLOSING[opening])
            self.take(known)
            return lines
        word = self.words[self.next]
        if not word or word in "]}>[:;,":
            raise self.refuse("and not a value")
        strings = word[0] in "'\""
        self.take(known)
        if (
            known
            and option.containing_type.name == "V1LayerParameter"
            and option.name == "type"
            and not strings
        ):
            self.kept.words[-1] = f'"{word}"'  # an enum there, text here
        while strings and self.words[self.next][:1] in ("'", '"'):  # pieces of one string
            self.take(known)
        return Lines(line)
