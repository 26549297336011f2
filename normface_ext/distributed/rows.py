"""The rows of a parameter that a gradient touches, whether it is dense, sparse, or of a sharded parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from .shard import shard_range


def local(tensor: Tensor) -> Tensor:
    """A DTensor's own part; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class TouchedRows:
    """``values`` [K, ...] is the gradient of ``parameter[index]``; every row where ``index`` is None."""

    index: Tensor | None
    values: Tensor

    @classmethod
    def of(cls, parameter: Tensor) -> TouchedRows | None:
        """None where there is no gradient. A sparse gradient of a DTensor names rows of the whole tensor."""
        gradient = parameter.grad
        if gradient is None:
            return None
        if not gradient.is_sparse:
            return cls(None, local(gradient))
        gradient = gradient.coalesce()
        index = gradient.indices()[0]
        if isinstance(parameter, DTensor):
            index = index - first_row(parameter)
        return cls(index, gradient.values())

    def take(self, tensor: Tensor) -> Tensor:
        """The touched rows of something shaped like the parameter, a copy if there is an index."""
        return tensor if self.index is None else tensor.index_select(0, self.index)

    def put(self, tensor: Tensor, rows: Tensor) -> None:
        """Writes what ``take`` gave, changed, back."""
        if self.index is not None:
            tensor.index_copy_(0, self.index, rows)


def sharded_dimensions(parameter: DTensor) -> tuple[int, ...]:
    """The dimensions of its mesh along which ranks have different parts of a parameter."""
    return tuple(k for k, placement in enumerate(parameter.placements) if not placement.is_replicate())


def first_row(parameter: DTensor) -> int:
    """The first row of a ``Shard(0)`` parameter on this rank."""
    mesh = parameter.device_mesh
    if mesh.ndim != 1 or parameter.placements != (Shard(0),):
        raise ValueError(
            "sparse gradient: expected its parameter to be sharded by Shard(0) over a 1-D mesh,"
            f" got {parameter.placements} over {mesh.ndim} dimension(s)"
        )
    return shard_range(parameter.shape[0], mesh.size(), mesh.get_local_rank())[0]
