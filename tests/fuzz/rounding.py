"""What stands where a kernel rounds. The formulas call it with their cosines, distances and logits: the base
class leaves everything as it is, ``Disturbed`` moves them by what a rounding may move them, and how far the
results move then is what an honest kernel may be off.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Rounding:
    def norms(self, n: Tensor) -> Tensor:
        return n

    def cosines(self, c: Tensor, own: Tensor) -> Tensor:
        """c [N, C]; own [N, C] says where the label's column is."""
        return c

    def logits(self, z: Tensor) -> Tensor:
        return z

    def distances(self, d: Tensor, way: int = 1) -> Tensor:
        """`way`: of two that are compared the second goes the other way."""
        return d

    def upstream(self, g: Tensor) -> Tensor:
        """A gradient that comes back: the products that it enters round too."""
        return g


class Held(Rounding):
    """Norms as constants: the gradients before their radial part is taken out."""

    def norms(self, n: Tensor) -> Tensor:
        return n.detach()


class Recorded(Rounding):
    """Keeps the cosines and, after backward, the magnitude of their gradient."""

    def __init__(self) -> None:
        self.c: Tensor | None = None
        self.slope: Tensor | None = None

    def cosines(self, c: Tensor, own: Tensor) -> Tensor:
        self.c = c.detach()
        if c.requires_grad:
            c.register_hook(self._keep)
        return c

    def _keep(self, slope: Tensor) -> None:
        self.slope = slope.abs()


class Disturbed(Recorded):
    """By `size`: everything in the direction of `sign`, or at random where sign is 0. The label's column goes
    the other way, which is the worst for a softmax and for a hinge; `cell` is for every cell alone."""

    def __init__(self, size: float, cell: float, sign: int, seed: int = 0) -> None:
        super().__init__()
        self.size, self.cell, self.sign = size, cell, sign
        self.generator = torch.Generator().manual_seed(seed)

    def _noise(self, like: Tensor) -> Tensor:
        if self.sign:
            return torch.full_like(like, float(self.sign)).detach()
        return (2 * torch.randint(2, like.shape, generator=self.generator) - 1).to(like)

    def cosines(self, c: Tensor, own: Tensor) -> Tensor:
        noise = self.size * self._noise(c)
        return super().cosines(c + torch.where(own, -noise, noise), own)

    def logits(self, z: Tensor) -> Tensor:
        return z if self.sign else z + self.cell * self._noise(z)

    def distances(self, d: Tensor, way: int = 1) -> Tensor:
        return d * (1 + way * self.size * self._noise(d))

    def upstream(self, g: Tensor) -> Tensor:
        return g if self.sign else g * (1 + self.size * self._noise(g))


EXACT = Rounding()
