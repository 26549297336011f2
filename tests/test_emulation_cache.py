"""The test build is kept by what it was made from, once for all checkouts, and the folder stays small."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from emulation import build, cache

needs_compiler = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "normface_ext" / "emulation"


def library(tmp_path: Path, text: str = "machine code") -> Path:
    path = tmp_path / "built.so"
    path.write_text(text)
    return path


def test_what_is_kept_is_found(tmp_path: Path, folder: Path) -> None:
    assert cache.find("a-1.so") is None
    kept = cache.keep("a-1.so", library(tmp_path))
    assert kept == folder / "a-1.so" == cache.find("a-1.so")
    assert kept.read_text() == "machine code"
    assert [path.name for path in folder.iterdir()] == ["a-1.so"]  # nothing half done


def test_the_longest_unused_goes_first(tmp_path: Path, folder: Path) -> None:
    for age in range(cache.KEPT):
        kept = cache.keep(f"{age}.so", library(tmp_path))
        os.utime(kept, (1e9 + age, 1e9 + age))
    cache.find("0.so")
    cache.keep("new.so", library(tmp_path))
    left = {path.name for path in folder.iterdir()}
    assert len(left) == cache.KEPT and {"0.so", "new.so"} <= left and "1.so" not in left


def test_without_a_place_to_write_the_build_itself_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    built = library(tmp_path)
    assert cache.keep("a-1.so", built) == built and cache.find("a-1.so") is None


def keep_often(home: str, source: str) -> None:
    os.environ["XDG_CACHE_HOME"] = home
    for _ in range(50):
        assert len(cache.keep("same.so", Path(source)).read_bytes()) == 100_000  # whole, whoever wrote it


def test_two_runs_may_keep_the_same_library_at_once(tmp_path: Path, folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = []
    for letter in "ab":
        source = tmp_path / letter
        source.write_text(letter * 100_000)
        arguments = (os.environ["XDG_CACHE_HOME"], str(source))
        processes.append(context.Process(target=keep_often, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in folder.iterdir()] == ["same.so"]
    assert len(set((folder / "same.so").read_text())) == 1


def test_every_byte_path_and_fact_counts(tmp_path: Path) -> None:
    for name in ("a.h", "b.h", "c.h"):
        (tmp_path / name).write_text(name)
    a, b, c = (tmp_path / name for name in ("a.h", "b.h", "c.h"))
    names = {cache.fingerprint(tmp_path, [a, b], "-O2", "g++ 12")}
    names.add(cache.fingerprint(tmp_path, [a], "-O2", "g++ 12"))
    names.add(cache.fingerprint(tmp_path, [a, c], "-O2", "g++ 12"))
    names.add(cache.fingerprint(tmp_path, [a, b], "-O1", "g++ 12"))
    names.add(cache.fingerprint(tmp_path, [a, b], "-O2g++ 12", ""))
    b.write_text("b.h ")
    names.add(cache.fingerprint(tmp_path, [b, a], "-O2", "g++ 12"))
    assert len(names) == 6
    assert cache.fingerprint(tmp_path, [a, b], "-O2", "g++ 12") in names  # their order does not


def checkout(place: Path) -> ModuleType:
    """build.py of another checkout."""
    kept = shutil.ignore_patterns("__pycache__")
    shutil.copytree(build.CSRC, place / "csrc", ignore=kept)
    shutil.copytree(build.HERE, place / "tests" / "emulation", ignore=kept)
    source = place / "tests" / "emulation" / "build.py"
    spec = importlib.util.spec_from_file_location(f"build_of_{place.name}", source)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_compiler
def test_another_checkout_of_the_same_sources_has_the_same_name(tmp_path: Path) -> None:
    there = checkout(tmp_path / "there")
    for name in build.NAMESPACES:
        for sanitize in (False, True):
            assert there.name_of(name, sanitize) == build.name_of(name, sanitize)
    every = set(build.NAMESPACES)
    assert len({build.name_of(name, sanitize) for name in every for sanitize in (0, 1)}) == 2 * len(every)
    headers = {"csrc/math/softmax.h": every, "csrc/cpu/rows.h": {"cpu"}}
    headers |= {"csrc/cuda/device/rows.cuh": every - {"cpu"}, "tests/emulation/watch.h": every}
    for header, changes in headers.items():
        before = {name: there.name_of(name, False) for name in build.NAMESPACES}
        with (there.ROOT / header).open("a") as file:
            file.write("// one more line\n")
        assert {name for name in before if there.name_of(name, False) != before[name]} == changes, header


@needs_compiler
def test_a_second_build_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Of a library as small as can be: what ninja makes of a broken source is told."""
    there = checkout(tmp_path / "there")
    source = tmp_path / "there" / "csrc" / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(there, "sources_of", lambda library: [source])
    first = there.build("cpu")
    assert first.parent == folder
    shutil.rmtree(there.OUTPUT)
    assert there.build("cpu") == first and not there.OUTPUT.exists()
    source.write_text("not C++\n")
    with pytest.raises(RuntimeError, match="the cpu library of the test build does not compile"):
        there.build("cpu")
    assert [path.name for path in folder.iterdir()] == [first.name]
