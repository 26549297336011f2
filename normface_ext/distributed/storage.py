"""What ``torch.distributed.checkpoint`` is told to do otherwise: write with checksums, read nothing that was
not verified, run no code of a file, and assign nothing before everything has been read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.futures import Future

from .collectives import explained
from .manifest import Manifest, Part, checksum

Result = TypeVar("Result")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(what: str, mine: Result, group: ProcessGroup | None = None) -> list[Result]:
    """A value of every rank of a group, or of all ranks that there are, by rank."""
    group = group or dist.group.WORLD
    if not dist.is_initialized() or group is None:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    with explained(what, group):
        dist.all_gather_object(everyone, mine, group=group)
    return everyone


def together(what: str, work: Callable[[], Result], group: ProcessGroup | None = None) -> Result:
    """What ``work`` returns here; its error on every rank, if it failed on any."""
    result: Result | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    told = None if failure is None else _retold(failure, what, _rank())
    for heard in gathered(what, told, group):
        if heard is not None:
            raise heard from failure
    return cast(Result, result)


def _retold(error: Exception, what: str, rank: int) -> Exception:
    """The error once more, with its rank. A new one: a library's own may not survive the journey to the
    others. Of one that nobody foresaw the beginning, and what was going on."""
    if isinstance(error, OSError) and error.errno is not None:
        at = f": {error.filename}" if error.filename else ""
        return type(error)(error.errno, f"{error.strerror}{at} (rank {rank})")
    for kind in (FileNotFoundError, OSError, ValueError, TypeError, IndexError):
        if isinstance(error, kind):
            return kind(f"{error} (rank {rank})")
    return RuntimeError(f"{what} failed: {type(error).__name__}: {str(error)[:120]} (rank {rank})")


def explained_failure(op: str, path: Path, error: CheckpointException) -> BaseException:
    """DCP's exception, which is no Exception and whose text is a traceback, as one that is."""
    rank, (first, _) = next(iter(error.failures.items()))
    if not isinstance(first, Exception):
        return first  # Ctrl-C
    retold = _retold(first, op, rank)
    if isinstance(retold, OSError) and retold.errno is not None:
        text = str(retold.strerror)
        return retold if text.startswith(op) else type(retold)(retold.errno, f"{op}: {path}: {text}")
    return retold if str(retold).startswith(f"{op}:") else type(retold)(f"{op}: {path}: {retold}")


class Writer(FileSystemWriter):
    """Remembers what it wrote, and says which file could not be written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._results: list[Any] = []
        self._sizes: dict[Any, list[int]] = {}  # of the blocks of tensors; [] of plain values

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        try:
            done = super().write_data(plan, planner)
            self._results = done.wait()
            for item in plan.items:
                self._sizes[item.index] = list(item.tensor_data.chunk.sizes) if item.tensor_data else []
        except Exception as error:
            # The archive that could not be written is closed on the way out, which raises what hides why.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            file = self._folder / f"{plan.storage_data.prefix}0.distcp"
            raise OSError(cause.errno, f"save_checkpoint: writing {file} failed: {cause.strerror}") from error
        return done

    def parts(self) -> list[tuple[str, Part]]:
        """This rank's parts by name; reads the files again, for their checksums."""
        found = []
        for result in self._results:
            index, info = result.index, result.storage_data
            offset = None if index.offset is None else list(index.offset)
            digest = checksum(self._folder / info.relative_path, info.offset, info.length)
            place = info.relative_path, info.offset, info.length
            found.append((index.fqn, Part(offset, self._sizes[index], *place, digest)))
        return found


class Reader(FileSystemReader):
    """Reads what the manifest lists, after its checksums were compared."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder)
        self._folder, self._manifest = folder, manifest

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._manifest.as_metadata()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        seen = set()
        for item in plan.items:
            if item.storage_index not in seen:
                seen.add(item.storage_index)
                self._verify(item)
        try:
            return super().read_data(plan, planner)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever a forged archive may lead to
            raise ValueError(
                f"load_checkpoint: expected {self._folder} to hold tensors and plain values, got"
                f" {type(error).__name__}: {str(error)[:80]}"
            ) from error

    def _verify(self, item: ReadItem) -> None:
        part, name = self._manifest.part(item.storage_index), item.storage_index.fqn
        path = self._folder / part.file
        if not path.exists():
            raise FileNotFoundError(f"load_checkpoint: expected {path}, which holds {name}, got no such file")
        if checksum(path, part.start, part.length) != part.checksum:
            raise ValueError(
                f"load_checkpoint: expected {path} as it was saved, got other contents of {name[:100]}"
            )


class LoadAll(DefaultLoadPlanner):
    """Reads into memory of its own, on the host; :meth:`assign` then puts everything in its place."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list[tuple[ReadItem, Tensor]] = []
        self._values: list[tuple[tuple[Any, ...], object]] = []

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return torch.empty(read_item.lengths, dtype=self.lookup_tensor(read_item.dest_index).dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self._tensors.append((read_item, tensor))

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        self._values.append((self.mappings[read_item.dest_index.fqn], plain))

    def check_groups(self, op: str, path: Path) -> None:
        """Raises ValueError where an optimizer's group has other parameters than the one that was saved."""
        for way, value in self._values:
            if way[:2] == ("optimizers", "param_groups") and way[-1] == "params" and value != self._at(way):
                raise ValueError(
                    f"{op}: expected group {way[2]} of the optimizers to have its parameters of {path},"
                    " got others"
                )

    def _at(self, way: tuple[Any, ...]) -> Any:
        value: Any = self.original_state_dict
        for key in way:
            value = value[key]
        return value

    def assign(self) -> None:
        for item, tensor in self._tensors:
            self.transform_tensor(item, self.lookup_tensor(item.dest_index)).detach().copy_(tensor)
        for way, value in self._values:
            self._at(way[:-1])[way[-1]] = value
