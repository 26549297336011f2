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

from ..engine.arguments import ABOVE_ZERO, AT_LEAST_ZERO, FRACTION, flag, number
from .collectives import explained
from .conversion import spread_optimizer_state
from .rows import TouchedRows, local, sharded_dimensions


def _not_negative(owner: str, **values: float) -> dict[str, float]:
    return {name: number(owner, name, value, AT_LEAST_ZERO) for name, value in values.items()}


class RowOptimizer(Optimizer):
    """What the two have in common: a step over the touched rows, and state that checkpoints can ask for."""

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, and of a state of one process each rank takes its rows: ``load_optimizer_state``."""
        super().load_state_dict(spread_optimizer_state(type(self).__name__, self, state_dict))

    def prepare(self) -> None:
        """Makes the state that first steps would make. Where there is none, ``torch.distributed.checkpoint``
        makes it by a step with gradients of zero, which counts and takes in the weight decay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    self._state_of(parameter, group)

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What is kept of a parameter, of zeros at first."""
        raise NotImplementedError

    def _update(self, parameter: Tensor, rows: TouchedRows, group: dict[str, Any]) -> None:
        raise NotImplementedError


class RowSGD(RowOptimizer):
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
        numbers = _not_negative("RowSGD", lr=lr, momentum=momentum, weight_decay=weight_decay)
        nesterov = flag("RowSGD", "nesterov", nesterov)
        if nesterov and momentum == 0:
            raise ValueError("RowSGD: expected `momentum` > 0 for nesterov, got 0")
        defaults = {**numbers, "nesterov": nesterov}
        super().__init__(params, defaults)

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state

    def _update(self, parameter: Tensor, rows: TouchedRows, group: dict[str, Any]) -> None:
        whole, state = local(parameter), self._state_of(parameter, group)
        weight = rows.take(whole)
        step = rows.values.to(weight.dtype)
        if group["weight_decay"]:
            step = step.add(weight, alpha=group["weight_decay"])
        if group["momentum"]:
            buffer = local(state["momentum_buffer"])
            momentum = rows.take(buffer).mul_(group["momentum"]).add_(step)
            rows.put(buffer, momentum)
            step = step.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
        rows.put(whole, weight.add_(step, alpha=-group["lr"]))


class RowAdamW(RowOptimizer):
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
        numbers = _not_negative("RowAdamW", lr=lr, eps=eps, weight_decay=weight_decay)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"RowAdamW: expected `betas` to be two numbers, got {type(betas).__name__}")
        first, second = (number("RowAdamW", "betas", beta, FRACTION) for beta in betas)
        super().__init__(params, {**numbers, "betas": (first, second)})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counts stay float32: torch casts what it loads to the parameter's dtype; bfloat16 counts to 256."""
        state_dict = spread_optimizer_state(type(self).__name__, self, state_dict)
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            if name in state_dict["state"]:
                count = state_dict["state"][name]["row_step"]
                self.state[parameter]["row_step"] = count.to(parameter.device, torch.float32)

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            # One count per row, in the parameter's own sharding; a 0-d parameter is one row.
            per_row = parameter.detach().flatten(1)[:, 0] if parameter.dim() > 1 else parameter.detach()
            state["row_step"] = torch.zeros_like(per_row, dtype=torch.float32)
        return state

    def _update(self, parameter: Tensor, rows: TouchedRows, group: dict[str, Any]) -> None:
        whole, state = local(parameter), self._state_of(parameter, group)
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


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` (2-norm) for a backbone and sharded heads together.

    torch's refuses a mixture of plain and sharded parameters. Here the squares of a sharded gradient are
    added over the ranks of the mesh dimensions that shard it; those of any other, which every rank has in
    full, are counted once.
    Every rank gets the same norm and the same factor max_norm / (norm + 1e-6), at most 1.

    Returns:
        The norm before clipping, 0-d, float32 (float64 if a gradient is).

    Raises:
        ValueError: max_norm not above 0.
        RuntimeError: a rank died or came too late.
    """
    max_norm = number("clip_grad_norm_", "max_norm", max_norm, ABOVE_ZERO)
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    given = [parameter for parameter in parameters if parameter.grad is not None]
    if not given:
        return torch.zeros(())
    shared: list[Tensor] = []
    by_sharding: dict[Any, list[Tensor]] = {}
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
                sharding = parameter.device_mesh, sharded_dimensions(parameter)
                by_sharding.setdefault(sharding, []).append(square)
            else:
                shared.append(square)
        device = gradients[0].device
        total = torch.stack(shared).sum() if shared else torch.zeros((), dtype=torch.float64, device=device)
        for (mesh, dimensions), squares in by_sharding.items():
            sum_of_shards = torch.stack(squares).sum()
            for group in (mesh.get_group(dimension) for dimension in dimensions):
                with explained("the all-reduce of gradient norms", group):
                    dist.all_reduce(sum_of_shards, group=group)
            total = total + sum_of_shards
        norm = total.sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for values in gradients:
            values.mul_(factor.to(values.dtype))
    wide = any(values.dtype == torch.float64 for values in gradients)
    return norm if wide else norm.float()
