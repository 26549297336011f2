"""Libraries of the test build, kept by what they were made from, for every checkout and every run.

They lie in $XDG_CACHE_HOME/normface_ext/emulation (~/.cache without it), at most KEPT of them: the one unused
for longest goes first. A name is the hash of all that decides the result, so nothing has to be invalidated,
and `rm -r` of the folder is always safe. A library comes to its name by a rename, so that of two runs which
build the same one either may win and neither reads half a file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

KEPT = 20  # about 5 MB each


def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "normface_ext" / "emulation"


def fingerprint(root: Path, sources: Iterable[Path], *facts: str) -> str:
    """Of the files, by their paths below root and their bytes, and of the facts: flags, versions."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{len(fact)}:{fact}".encode())
    for source in sorted(sources):
        content = source.read_bytes()
        digest.update(f"{source.relative_to(root).as_posix()}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()[:24]


def find(name: str) -> Path | None:
    """The library of that name, if it is here; it counts as used now."""
    path = folder() / name
    try:
        os.utime(path)
    except OSError:
        return None
    return path


def keep(name: str, built: Path) -> Path:
    """Puts a copy of the library there under that name and returns it; what was built, if that fails."""
    target = folder() / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as part:
            try:
                with built.open("rb") as library:
                    shutil.copyfileobj(library, part)
                part.flush()
                Path(part.name).replace(target)
            except OSError:
                Path(part.name).unlink(missing_ok=True)
                raise
    except OSError:  # read-only, or full: tests run from what was built, and build again next time
        return built
    drop_all_but(KEPT)
    return target


def drop_all_but(count: int) -> None:
    """Leaves the libraries used last. Another run may do the same, or use one: Linux keeps open files."""
    used = []
    for path in folder().glob("*.so"):
        try:
            used.append((path.stat().st_mtime_ns, path))
        except FileNotFoundError:
            continue  # the other run was quicker
    for _, path in sorted(used, reverse=True)[count:]:
        path.unlink(missing_ok=True)
