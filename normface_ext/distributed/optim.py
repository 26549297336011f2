"""Optimizers that touch only the rows that were trained, and the clipping that goes with them.

A sampled head gives a sparse gradient: the rows of the classes that took part. torch's SGD and AdamW refuse
those or decay and move every row. These leave a row's weight, momentum and step count as they are until
it is trained again. Dense gradients, of a backbone or of a head that is not sampled, get exactly torch's
update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .collectives import explained
from .rows import TouchedRows, local


def _at_least(owner: str, least: float, **values: float) -> None:
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{owner}: expected `{name}` >= {least:g}, got {value}")


class _RowOptimizer(Optimizer):
    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                rows = TouchedRows.of(parameter)
                if rows is not None:
                    self._update(parameter, rows, group)
        return loss

    def _update(self, parameter: Tensor, rows: TouchedRows, group: dict[str, Any]) -> None:
        raise NotImplementedError


class RowSGD(_RowOptimizer):
    """``torch.optim.SGD`` with momentum; a sparse gradient moves and decays its rows only.

    Per touched row: g += weight_decay w;  m = momentum m + g;  w -= lr (g + momentum m if nesterov else m).

    The arguments are those of ``torch.optim.SGD``, without dampening.

    Raises:
        ValueError: negative numbers, nesterov without momentum.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        _at_least("RowSGD", 0, lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and momentum == 0:
            raise ValueError("RowSGD: expected `momentum` > 0 for nesterov, got 0")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults)

    def _update(self, parameter: Tensor, rows: TouchedRows, group: dict[str, Any]) -> None:
        whole, state = local(parameter), self.state[parameter]
        weight = rows.take(whole)
        step = rows.values.to(weight.dtype)
        if group["weight_decay"]:
            step = step.add(weight, alpha=group["weight_decay"])
        if group["momentum"]:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = local(state["momentum_buffer"])
            momentum = rows.take(buffer).mul_(group["momentum"]).add_(step)
            rows.put(buffer, momentum)
            step = step.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
        rows.put(whole, weight.add_(step, alpha=-group["lr"]))


class RowAdamW(_RowOptimizer):
    """``torch.optim.AdamW``; a sparse gradient moves and decays its rows only.

    Steps are counted per row, so the bias correction of a row that is trained for the first time is that of
    a first step; ``torch.optim.SparseAdam`` counts them for the whole tensor and overshoots there.

    The arguments are those of ``torch.optim.AdamW``; weight_decay=0 is Adam.

    Raises:
        ValueError: negative numbers, betas outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        _at_least("RowAdamW", 0, lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"RowAdamW: expected `betas` in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(self, parameter: Tensor, rows: TouchedRows, group: dict[str, Any]) -> None:
        whole, state = local(parameter), self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            # One count per row, in the parameter's own sharding; a 0-d parameter is one row.
            per_row = parameter.detach().flatten(1)[:, 0] if parameter.dim() > 1 else parameter.detach()
            state["row_step"] = torch.zeros_like(per_row, dtype=torch.float32)
        counts, averages, squares = (local(state[name]) for name in ("row_step", "exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        weight, gradient = rows.take(whole), rows.values.to(whole.dtype)
        count = rows.take(counts).add_(1)
        average = rows.take(averages).lerp_(gradient, 1 - beta1)
        square = rows.take(squares).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        shape = (-1, *[1] * (weight.dim() - 1)) if weight.dim() > 1 else weight.shape
        correction1 = (1 - beta1 ** count.double()).view(shape).to(weight.dtype)
        correction2 = (1 - beta2 ** count.double()).sqrt().view(shape).to(weight.dtype)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = square.sqrt().div_(correction2).add_(group["eps"])
        weight.addcdiv_(average.div(correction1), denominator, value=-group["lr"])
        for tensor, values in ((counts, count), (averages, average), (squares, square), (whole, weight)):
            rows.put(tensor, values)


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` (2-norm) for a backbone and sharded heads together.

    torch's refuses a mixture of plain and sharded parameters. Here the squares of a sharded gradient are
    added over the ranks of its mesh, those of any other, which every rank has in full, are counted once.
    Every rank gets the same norm and the same factor max_norm / (norm + 1e-6), at most 1.

    Returns:
        The norm before clipping, 0-d, float32 (float64 if a gradient is).

    Raises:
        ValueError: max_norm not above 0.
        RuntimeError: a rank died or came too late.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm_: expected `max_norm` > 0, got {max_norm}")
    given = [parameter for parameter in parameters if parameter.grad is not None]
    if not given:
        return torch.zeros(())
    shared: list[Tensor] = []
    by_mesh: dict[Any, list[Tensor]] = {}
    gradients = []
    with torch.no_grad():
        for parameter in given:
            gradient = parameter.grad
            assert gradient is not None
            if gradient.is_sparse:
                parameter.grad = gradient = gradient.coalesce()
                values = gradient.values()
            else:
                values = local(gradient)
            gradients.append(values)
            square = values.double().square().sum()
            if isinstance(parameter, DTensor):
                by_mesh.setdefault(parameter.device_mesh, []).append(square)
            else:
                shared.append(square)
        device = gradients[0].device
        total = torch.stack(shared).sum() if shared else torch.zeros((), dtype=torch.float64, device=device)
        for mesh, squares in by_mesh.items():
            sum_of_shards = torch.stack(squares).sum()
            with explained("the all-reduce of gradient norms", mesh.get_group()):
                dist.all_reduce(sum_of_shards, group=mesh.get_group())
            total = total + sum_of_shards
        norm = total.sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for values in gradients:
            values.mul_(factor.to(values.dtype))
    wide = any(values.dtype == torch.float64 for values in gradients)
    return norm if wide else norm.float()
