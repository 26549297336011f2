"""What every reader of files owes its caller, and seeded mutations of good files to try it with.

    data = mutations(good, seed)                   # the same seed, the same bytes
    path.write_bytes(data)
    found = assert_contract(read, path)            # the value that was read, or the error that refused it

A reader answers with a value or refuses: a ValueError or an OSError that names the file, in a sentence of at
most LONGEST characters, within SECONDS, with memory that is a small multiple of the file, without running
code of the file or writing to the disk. What is left to the caller is whether a value is the right one.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

LONGEST = 300
SECONDS = 2.0
#: Memory that a reader may take: so many bytes, and so many for each byte of the file.
ROOM, MULTIPLE = 32 << 20, 16
#: Beyond this no memory is handed out: a reader that asks for terabytes is stopped, not the machine.
CEILING = 6 << 30

#: Numbers that are too large, too many digits, no numbers, or numbers only for Python.
NUMBERS = (
    b"-1", b"0", b"1e999", b"-1e999", b"nan", b"inf", b"1e39", b"9" * 30, b"9" * 5000, b"1_0", b"0x10",
    b"1.5", b"4294967295", b"4294967296", b"2147483648", b"-2147483649", b"9223372036854775808",
    b"\xd9\xa1",
)  # fmt: skip
#: Signs that change what a line, a string, a name or a size is.
SIGNS = (
    b"-", b".", b"\n", b"\r", b"\r\n", b"\t", b" ", b"\f", b"\v", b"\x1c", b"\x85", b"\xc2\x85",
    b"\xe2\x80\xa8", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff", b"\xe9", b"\xed\xa0\x80", b"#", b"'",
    b'"', b"\\", b"%n", b"..", b"{", b"}", b"{" * 300, b"}" * 300, b"[", b"]", b"<", b">", b":", b",", b";",
    b"/", b"a" * 3000, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0" * 8, b"\x80" * 12,
    b"PK\x03\x04", b"\x1f\x8b",
)  # fmt: skip


def mutations(data: bytes, seed: int) -> bytes:
    """``data`` after one to four random changes; the same for the same seed."""
    chance = random.Random(seed)
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        chance.choice(_CHANGES)(changed, chance)
    return bytes(changed)


def _place(data: bytearray, chance: random.Random) -> int:
    """Anywhere, but half of the time where a file keeps its header and its directory."""
    if chance.random() < 0.25:
        return chance.randint(0, min(len(data), 64))
    if chance.random() < 0.33:
        return len(data) - chance.randint(0, min(len(data), 64))
    return chance.randint(0, len(data))


def _block(data: bytearray, chance: random.Random) -> slice:
    start = _place(data, chance)
    return slice(start, start + chance.choice((1, 2, 4, 8, 16, 64, 256, max(1, len(data) // 3))))


def _flip(data: bytearray, chance: random.Random) -> None:
    if data:
        data[min(_place(data, chance), len(data) - 1)] ^= 1 << chance.randrange(8)


def _set_byte(data: bytearray, chance: random.Random) -> None:
    if data:
        data[min(_place(data, chance), len(data) - 1)] = chance.choice((0, 1, 127, 128, 255, 10, 32, 48))


def _truncate(data: bytearray, chance: random.Random) -> None:
    del data[_place(data, chance) :]


def _delete(data: bytearray, chance: random.Random) -> None:
    del data[_block(data, chance)]


def _insert(data: bytearray, chance: random.Random) -> None:
    place = _place(data, chance)
    data[place:place] = chance.choice(NUMBERS + SIGNS)


def _overwrite(data: bytearray, chance: random.Random) -> None:
    place, fragment = _place(data, chance), chance.choice(NUMBERS + SIGNS)
    data[place : place + len(fragment)] = fragment


def _duplicate(data: bytearray, chance: random.Random) -> None:
    block = bytes(data[_block(data, chance)])
    place = _place(data, chance)
    data[place:place] = block * chance.choice((1, 1, 2, 50))


def _swap(data: bytearray, chance: random.Random) -> None:
    a, b, c, d = sorted(chance.randint(0, len(data)) for _ in range(4))
    data[a:d] = data[c:d] + data[b:c] + data[a:b]


def _change_number(data: bytearray, chance: random.Random) -> None:
    """Another value for a number written in digits."""
    places = [
        i for i, byte in enumerate(data) if 48 <= byte <= 57 and (i == 0 or not 48 <= data[i - 1] <= 57)
    ]
    if places:
        start = chance.choice(places)
        end = start
        while end < len(data) and 48 <= data[end] <= 57:
            end += 1
        data[start:end] = chance.choice(NUMBERS)


def _change_line(data: bytearray, chance: random.Random) -> None:
    """A line twice, gone, or in another place."""
    lines = data.split(b"\n")
    line = lines.pop(chance.randrange(len(lines)))
    for _ in range(chance.choice((0, 1, 2))):
        lines.insert(chance.randint(0, len(lines)), line)
    data[:] = b"\n".join(lines)


_CHANGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip, _flip, _set_byte, _truncate, _delete, _insert, _overwrite, _duplicate, _swap, _change_number,
    _change_line,
)  # fmt: skip


class TooSlowError(BaseException):
    """Not an Exception, so that no reader takes it for a fault of the file."""


def assert_contract(read: Callable[[Path], Any], path: Path, *, longest: int = LONGEST) -> Any:
    """Reads the file; the value, or the error that refuses it. AssertionError where the contract is broken.

    Args:
        read: called with the path.
        longest: characters of the whole message, where it is a list of sentences; each of its lines has at
            most LONGEST.
    """
    budget = ROOM + MULTIPLE * path.stat().st_size
    with _watched() as watched:
        try:
            found = read(path)
        except (ValueError, OSError) as error:
            found = error
        except TooSlowError:
            raise AssertionError(f"{path}: more than {SECONDS} s") from None
        except BaseException as error:  # AssertionError as well: a reader has no business with it
            text = str(error)[:300]
            raise AssertionError(
                f"{path}: expected ValueError or OSError, got {type(error).__name__}: {text}"
            ) from error
    assert not watched.acts, f"{path}: reading it did {watched.acts}"
    assert watched.seconds <= SECONDS, f"{path}: {watched.seconds:.1f} s"
    assert watched.memory <= budget, (
        f"{path}: {watched.memory >> 20} MiB of memory for {path.stat().st_size} bytes"
    )
    if isinstance(found, BaseException):
        text = str(found)
        kind = type(found).__name__
        assert type(found).__module__ == "builtins" and not isinstance(found, UnicodeError), (
            f"{path}: a {kind}: {text[:300]}"
        )
        assert path.name in text, f"{path}: a {kind} without the file's name: {text[:300]}"
        assert len(text) <= longest, f"{path}: a message of {len(text)} characters: {text[:300]}"
        most = max(map(len, text.splitlines()))
        assert most <= LONGEST, f"{path}: a sentence of {most} characters: {text[:300]}"
    return found


class _Watched:
    """What a call took: seconds of the processor, bytes above what the process had, and forbidden acts."""

    def __init__(self) -> None:
        self.seconds, self.memory = 0.0, 0
        self.acts: list[str] = []


_active: list[_Watched] = []
#: Events of sys.audit that no reader may cause: programs, code, the network, changes of the disk.
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "exec",
              "socket.connect", "shutil.", "os.remove", "os.rename", "os.mkdir", "os.chmod")  # fmt: skip


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _active:
        return
    if event == "open":
        path, mode, _ = arguments
        if isinstance(mode, str) and not set("wax+").isdisjoint(mode):
            _active[-1].acts.append(f"open({path!r}, {mode!r})")
    elif event.startswith(_FORBIDDEN) and not _importing():
        _active[-1].acts.append(event)


def _importing() -> bool:
    """Whether the interpreter is importing a module of its own, which compiles and executes it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if "importlib" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


sys.addaudithook(_audit)


@contextmanager
def _watched() -> Iterator[_Watched]:
    """Measures the block, and ends it when it takes too long or asks for memory without end."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlowError

    watched = _Watched()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident memory starts anew
    before = _status("VmRSS")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + CEILING, hard))
    start = time.process_time()
    # Seconds of the processor, which other programs do not lengthen; twice, so that the number is reported.
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    _active.append(watched)
    try:
        yield watched
    finally:
        _active.pop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        watched.seconds = time.process_time() - start
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, handler)
        watched.memory = _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) << 10
    raise AssertionError(f"/proc/self/status has no {name}")


def run(
    read: Callable[[Path], Any], name: str, good: bytes, seeds: range, folder: Path, *,
    right: Callable[[Any, bytes], bool], wrap: Callable[[bytes], bytes] = bytes, longest: int = LONGEST,
) -> tuple[int, int]:  # fmt: skip
    """Tries a reader with a mutation of ``good`` for each seed; (read, refused), how many.

    Args:
        name: of the files; each lies in ``folder`` under this name, so that messages can be looked at.
        right: of (value, mutated bytes): whether that is what the bytes mean.
        wrap: mutated bytes -> bytes of the file: compressed, or with the checksums that they should have.
    """
    path = folder / name
    path.write_bytes(wrap(good))
    value = assert_contract(read, path, longest=longest)  # also warms up what is imported on the first call
    assert not isinstance(value, BaseException) and right(value, good), f"the good file: {value}"
    counts = [0, 0]
    for seed in seeds:
        data = mutations(good, seed)
        path.write_bytes(wrap(data))
        try:
            value = assert_contract(read, path, longest=longest)
            refused = isinstance(value, BaseException)
            assert refused or right(value, data), f"{path}: read wrong: {str(value)[:300]}"
        except Exception as error:  # of the reader, or of `right`
            kept = folder / f"seed_{seed}_{name}"
            os.replace(path, kept)
            raise AssertionError(f"seed {seed}, kept as {kept}: {type(error).__name__}: {error}") from error
        counts[refused] += 1
    return counts[0], counts[1]
