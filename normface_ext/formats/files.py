"""Files of tensors, read without running anything of them: torch.save's two formats, and safetensors.

``torch.load(weights_only=True)`` makes tensors and plain values. What trainers put beside them (a class as a
key, a NumPy number) becomes an empty object that does nothing; any other name in a file is refused.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ..engine.files import clip, file_name, quoted, reading

EXPECTED = "a file of tensors (torch.save or safetensors)"
#: The description of the tensors in a zip file, which is read whole. Real ones are below 10 MiB.
LONGEST_PICKLE = 64 << 20
#: Whose objects may stand beside the tensors of a checkpoint. They are data there; none is made.
_TRAINERS = ("argparse.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "numpy.", "omegaconf.",
             "pathlib.", "torch.optim.")  # fmt: skip
_MEANT = {
    ".caffemodel": "normface_ext.caffe.load_head(prototxt).load_caffemodel(file) reads it",
    ".prototxt": "normface_ext.caffe.load_head reads it",
    ".onnx": "an ONNX graph has no training head",
}
#: What ``torch.serialization.safe_globals`` takes: here a class and the name that it stands for.
_Replaced: TypeAlias = Callable[..., Any] | tuple[Callable[..., Any], str]


class _Absent:
    """In the place of an object that is not made. It takes whatever is said to it, and keeps nothing."""

    def __new__(cls, *args: object) -> _Absent:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_tensors(path: str | os.PathLike[str]) -> Any:
    """What a file holds: a tensor, or dicts and lists of tensors and plain values. On the CPU, and as far as
    the format allows still in the file: what is kept has to be copied.

    Raises:
        ValueError: what is not such a file, or damaged; a sentence with the file's name.
        OSError: as ``open`` has it.
        ImportError: a safetensors file, and safetensors is not installed.
    """
    where = file_name(path)
    try:
        with open(path, "rb") as file:
            begin = file.read(16)
    except OSError as error:
        raise OSError(error.errno, error.strerror, where) from error
    suffix = os.path.splitext(os.fspath(path))[1]
    if begin.startswith(b"PK\x03\x04"):
        return _of_zip(os.fspath(path), where)
    if begin.startswith(b"\x80\x02"):
        return _of_pickle(path, where)
    if suffix == ".safetensors" or begin[8:9] == b"{":
        return _of_safetensors(os.fspath(path), where)
    meant = f"; {_MEANT[suffix]}" if suffix in _MEANT else ""
    raise ValueError(f"{where}: expected {EXPECTED}, got one that begins with {quoted(begin, 8)}{meant}")


def _of_zip(path: str, where: str) -> Any:
    """Tensors are mapped from the file, so of a large checkpoint only what is copied takes memory."""
    sizes = _checked_zip(path, where)
    with reading(where, EXPECTED):
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    found = _load(path, where, _replaced(named, where), mmap=True)
    for tensor in _tensors(found):
        held = tensor.untyped_storage().nbytes()
        if held and held not in sizes:
            raise ValueError(
                f"{where}: expected {EXPECTED}, got a tensor of {held} bytes that it does not hold"
            )
    return found


def _checked_zip(path: str, where: str) -> set[int]:
    """The sizes of the entries of a sound file. torch.load looks neither at checksums nor at sizes."""
    with reading(where, EXPECTED), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = {entry.filename.rpartition("/")[2] for entry in entries}
        packed = next(
            (entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None
        )
        longest = max((e.file_size for e in entries if e.filename.endswith("data.pkl")), default=0)
        bad = None if packed else archive.testzip()
    if "constants.pkl" in names:
        raise ValueError(
            f"{where}: expected {EXPECTED}, got a TorchScript program; save the state_dict of its module"
        )
    if "data.pkl" not in names:
        raise ValueError(f"{where}: expected {EXPECTED}, got a zip file without data.pkl")
    if packed is not None:
        raise ValueError(f"{where}: expected {EXPECTED}, got a compressed entry {quoted(packed)}")
    if longest > LONGEST_PICKLE:
        raise ValueError(f"{where}: expected {EXPECTED}, got a data.pkl of {longest} bytes")
    if bad is not None:
        raise ValueError(
            f"{where}: expected {EXPECTED}, got an entry {quoted(bad)} with another checksum: it is damaged"
            " (or written after torch.serialization.set_crc32_options(False))"
        )
    return {entry.file_size for entry in entries}


def _replaced(named: list[str], where: str) -> list[_Replaced]:
    """For each name that torch.load would refuse a class that is empty."""
    others = sorted(name for name in named if not name.startswith(_TRAINERS))
    if others:
        raise ValueError(
            clip(
                f"{where}: expected {EXPECTED}, got one that asks for {quoted(others[0])}, which may run"
                " code: if you trust it, load it yourself and pass the state_dict"
            )
        )
    return [(type("Absent", (_Absent,), {}), name) for name in named]


def _of_pickle(path: str | os.PathLike[str], where: str) -> Any:
    """torch.save before torch 1.6."""
    return _load(path, where, [], mmap=False)


def _load(path: Any, where: str, replaced: list[_Replaced], mmap: bool) -> Any:
    with reading(where, EXPECTED), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: about storages and protocols of old files
        with torch.serialization.safe_globals(replaced):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _of_safetensors(path: str, where: str) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            f"{where}: needs safetensors, which is not installed or does not load ({error});"
            " `pip install safetensors` brings it"
        ) from error
    with reading(where, EXPECTED), safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)


def _tensors(found: Any) -> list[torch.Tensor]:
    """Every dense tensor, however deep; each container once, as a file may tie knots."""
    tensors: list[torch.Tensor] = []
    seen: set[int] = set()
    queue = [found]
    while queue:
        here = queue.pop()
        if isinstance(here, torch.Tensor):
            tensors += [here] if here.layout == torch.strided else []
        elif isinstance(here, (dict, list, tuple)) and id(here) not in seen:
            seen.add(id(here))
            queue.extend(here.values() if isinstance(here, dict) else here)
    return tensors
