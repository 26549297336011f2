"""What class-parallel modules have in common: a weight whose rows are spread over the ranks of a mesh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..cosine.rows import unit_rows_
from .conversion import spread_state, with_rows
from .shard import ClassShard

#: Classes whose initial weights come from one generator: the start does not depend on the number of ranks.
_INIT_BLOCK = 4096
#: Where DistributedDataParallel looks, at the module that it gets, for what is none of its business.
DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


class SpreadClasses(nn.Module):
    """For a head's class, before its own: ``weight`` [num_classes, in_features] is a DTensor ``Shard(0)``;
    where a class has several rows [num_classes, rows, in_features], since a class is not split."""

    weight: nn.Parameter
    in_features: int
    num_classes: int
    eps: float
    shard: ClassShard
    _seed: int

    def _spread(self, weight: nn.Parameter, mesh: DeviceMesh, seed: int) -> None:
        """Takes over the weight of a head: the first rank's, or on the meta device one that is drawn here."""
        self.shard = ClassShard.of(self.num_classes, mesh.get_group())
        self._seed = seed
        if weight.is_meta:
            device = device_of(mesh)
            of_class = self._of_class(weight)
            local = torch.empty(self.shard.count, *of_class, dtype=weight.dtype, device=device)
            self._draw_(local)
            spread = with_rows(local, self.num_classes, mesh)
        else:
            of_classes = weight.detach().view(self.num_classes, *self._of_class(weight))
            spread = distribute_tensor(of_classes, mesh, [Shard(0)])
        self.weight = nn.Parameter(spread, requires_grad=weight.requires_grad)

    def _of_class(self, weight: Tensor) -> tuple[int, ...]:
        """The shape of what a class has of a weight [rows, in_features] of one process."""
        rows = weight.shape[0] // self.num_classes
        return (self.in_features,) if rows == 1 else (rows, self.in_features)

    def _draw_(self, local: Tensor) -> None:
        """Uniform on the unit sphere, the same for any number of ranks; nobody holds other ranks' classes."""
        shard, of_class = self.shard, local.shape[1:]
        # A generator takes 32 bits of what it is given: those of the seed, moved on by the block.
        start = int(torch.randint(1 << 32, (), generator=torch.Generator().manual_seed(self._seed)))
        for begin in range(shard.first - shard.first % _INIT_BLOCK, shard.first + shard.count, _INIT_BLOCK):
            generator = torch.Generator().manual_seed((start + begin // _INIT_BLOCK) % (1 << 32))
            block = torch.randn(_INIT_BLOCK, *of_class, generator=generator)
            first, last = max(begin, shard.first), min(begin + _INIT_BLOCK, shard.first + shard.count)
            local[first - shard.first : last - shard.first] = block[first - begin : last - begin]
        unit_rows_(local.view(-1, self.in_features), self.eps, type(self).__name__)

    def _reset_weight(self) -> None:
        if isinstance(self.weight, DTensor):  # before that it is a placeholder without memory
            with torch.no_grad():
                self._draw_(self._local_weight())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Of a weight that is whole in the state_dict every rank takes its rows."""
        spread_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _local_weight(self) -> Tensor:
        """This rank's rows, without a gradient."""
        weight = self.weight
        assert isinstance(weight, DTensor)
        return weight.to_local().detach()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The weight, under both of the names that DistributedDataParallel has for it."""
        if not any(p.requires_grad for name, p in self.named_parameters() if name != "weight"):
            raise RuntimeError(
                f"{type(self).__name__}: expected no DistributedDataParallel around a class-parallel head"
                " that learns its weight alone, which needs none: call the head itself"
            )
        return ["weight", ".weight"]

    def renormalize_(self) -> None:
        """Overwrites this rank's rows by unit rows; see ``NormFaceLoss.renormalize_``."""
        unit_rows_(self._local_weight().view(-1, self.in_features), self.eps, type(self).__name__)

    def extra_repr(self) -> str:
        mine = (
            f"{self.shard.first}..{self.shard.first + self.shard.count - 1} here"
            if self.shard.count
            else "none here"
        )
        return f"{super().extra_repr()}, classes {mine}"


def device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)
