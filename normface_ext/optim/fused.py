"""Optimizers whose step of a head's weight is a part of backward, so that its gradient never exists."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..engine import checks, updates
from .weights import check_dtype, check_layout, check_sharing, has_hooks, heads_of, weight_of


class UpdatedGradient(Tensor):
    """What ``weight.grad`` is between a backward that has moved the weight and the optimizer's ``step()``: a
    shape without memory that raises on whatever is done with it, so that nobody skips it in silence."""

    @staticmethod
    def __new__(cls, weight: Tensor, owner: str) -> UpdatedGradient:
        made: UpdatedGradient = Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device
        )
        made.owner = owner
        return made

    owner: str

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"UpdatedGradient(shape={tuple(self.shape)}, taken by {self.owner})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise RuntimeError(sentence("the fused optimizer", f"`{func}` of it"))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:  # a file would have a storage of nothing
        raise RuntimeError(sentence(self.owner, "a copy of it in a file"))


def sentence(owner: str, got: str) -> str:
    return (
        f"{owner}: expected no use of the gradient of the head's weight, since backward has moved the weight"
        f" already and kept no gradient, got {got}. What needs it (clipping by the global norm, GradScaler, a"
        " second backward before step(), the weight in another part of the loss, DistributedDataParallel)"
        " needs an optimizer of torch.optim"
    )


class _Step(updates.Taker):
    """Of one weight; does not keep the optimizer alive."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.owner = type(optimizer).__name__

    def serves(self) -> bool:
        return self.optimizer() is not None

    def check(self, weight: Tensor) -> None:
        check_layout(self.owner, weight)
        check_dtype(self.owner, weight)
        self._check_hooks(weight)
        device = weight.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise RuntimeError(
                f"{self.owner}: expected autocast to bfloat16 or none, got float16, which needs a GradScaler:"
                " what it multiplies the loss by would have moved the weight before anyone divides by it"
            )
        wrapper = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is not None:
            check_sharing(self.owner, wrapper, _holder(wrapper, weight), weight)  # type: ignore[arg-type]

    def _check_hooks(self, weight: Tensor) -> None:
        if has_hooks(weight):
            raise RuntimeError(
                f"{self.owner}: expected no hook on the head's weight, whose gradient never exists, got one"
            )

    def begin(self, weight: Tensor) -> updates.Update | None:
        optimizer = self.optimizer()
        if optimizer is None:  # gone since the forward
            return None
        self._check_hooks(weight)  # one may have come since
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.owner}: expected a backward without create_graph, got one that would differentiate a"
                " gradient that is not kept"
            )
        if isinstance(weight.grad, UpdatedGradient):
            raise RuntimeError(sentence(self.owner, "a second backward before step() or zero_grad()"))
        if weight.grad is not None:
            raise RuntimeError(sentence(self.owner, "a gradient that something else has left in weight.grad"))
        group = next(
            (group for group in optimizer.param_groups if any(each is weight for each in group["params"])),
            None,
        )
        return None if group is None else optimizer.update_of(weight, group)

    def end(self, weight: Tensor, update: updates.Update) -> None:
        optimizer = self.optimizer()
        if optimizer is not None:
            optimizer.keep_state(weight, update)
        weight.grad = UpdatedGradient(weight, self.owner)


def _holder(module: nn.Module, weight: Tensor) -> nn.Module:
    """The module of `module` that has the weight, or `module`."""
    return next(
        (each for each in module.modules() if any(p is weight for p in each._parameters.values())), module
    )


class FusedOptimizer(Optimizer):
    """What they share: which weights backward moves, and what ``step()`` finds of them."""

    _heads: tuple[nn.Module, ...] = ()
    _taken: tuple[tuple[Tensor, _Step], ...] = ()

    def _take(self, module: nn.Module) -> None:
        """The weights of the heads in ``module``, which have to be in the groups."""
        owner, heads = type(self).__name__, heads_of(type(self).__name__, module)
        for head in heads:
            weight = weight_of(owner, head)
            check_layout(owner, weight)
            check_dtype(owner, weight)
            check_sharing(owner, module, head, weight)
            if has_hooks(weight):
                raise ValueError(f"{owner}: expected no hook on the weight of {type(head).__name__}, got one")
            if not any(each is weight for group in self.param_groups for each in group["params"]):
                raise ValueError(
                    f"{owner}: expected the weight of {type(head).__name__} among the parameters, got groups"
                    " without it"
                )
        self._heads = tuple(heads)
        self._attach()

    def _attach(self) -> None:
        """A head that was resized has another weight."""
        weights = [weight_of(type(self).__name__, head) for head in self._heads]
        known = [weight for weight, _ in self._taken]
        if len(weights) == len(known) and all(a is b for a, b in zip(weights, known, strict=True)):
            return
        self.release()
        self._taken = tuple((weight, _Step(self)) for weight in weights)
        for weight, taker in self._taken:
            updates.put(weight, taker)

    def release(self) -> None:
        """From now on the weights have gradients again, and ``step()`` is torch's for them too. The state of
        the optimizer stays as it is."""
        for weight, taker in self._taken:
            if updates.taken_by(weight) is taker:
                self._take_away(weight)
            updates.remove(weight, taker)
        self._taken = ()

    @staticmethod
    def _take_away(weight: Tensor) -> None:
        if isinstance(weight.grad, UpdatedGradient):
            weight.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight, _ in self._taken:
            self._take_away(weight)
        if self._taken:
            self._attach()
        super().zero_grad(set_to_none)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """torch's, which lists the parameters that ``step()`` moves: those with a gradient."""
        for weight, taker in self._taken:
            if updates.taken_by(weight) is not taker:
                raise RuntimeError(
                    f"{type(self).__name__}: expected to move the head's weight alone, got"
                    " one that a later optimizer has taken: `release()` the earlier one"
                )
            self._take_away(weight)
            if weight.grad is not None and any(each is weight for each in group["params"]):
                raise RuntimeError(
                    sentence(type(self).__name__, "a gradient in weight.grad")
                    + ". So do two labels per row, reduction over the hardest class, and the head's logits"
                )
        return super()._init_group(group, *lists)  # type: ignore[misc]

    def _check_capture(self, weight: Tensor) -> None:
        """Where this step's numbers are of no other step."""
        if checks.capturing(weight):
            raise RuntimeError(
                f"{type(self).__name__}: expected a backward that no CUDA graph captures, since a replay"
                " would repeat the numbers of this very step, got one that is captured"
            )

    def update_of(self, weight: Tensor, group: dict[str, Any]) -> updates.Update:
        """The step that a backward makes now."""
        raise NotImplementedError

    def keep_state(self, weight: Tensor, update: updates.Update) -> None:
        """After it."""
        raise NotImplementedError


def _parameters(head: nn.Module, params: Iterable[Any] | None) -> Iterable[Any]:
    if params is not None or not isinstance(head, nn.Module):
        return () if params is None else params
    return [each for each in head.parameters() if each.requires_grad]


class FusedSGD(FusedOptimizer, SGD):
    """``torch.optim.SGD`` whose step of a head's weight happens in backward, row by row.

    ``loss.backward()`` moves the weight and its momentum as soon as nothing reads a row any more, with the
    ``lr`` and the rest of its group as they are at that time; the gradient, as large as the weight, never
    exists. ``step()`` moves all other parameters (the learned scale, tensors of a margin, a backbone) as
    ``torch.optim.SGD`` does. State, ``state_dict`` and groups are those of ``torch.optim.SGD``: a run may
    switch between the two. In float32 and float64 the step is torch's to rounding; in bfloat16, too, a row of
    the gradient is rounded once, the momentum once and the weight once.

    Args:
        head: a ``NormFaceLoss``, ``SphereFace2Loss``, ``CContrastiveLoss`` or ``CTripletLoss``, perhaps
            class-parallel, or a module that contains some.
        lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, fused: of ``torch.optim.SGD``.
        params: parameters or groups, the heads' weights among them; by default all of ``head`` that need a
            gradient, in one group.

    Not possible, and refused by a sentence: clipping by the global norm, a GradScaler, several backward
    passes per step, ``create_graph``, hooks on the weight, a weight that another module has as well,
    DistributedDataParallel around it, sampled heads, two labels per row, float16 weights.
    ``torch.autograd.grad`` gives gradients and moves nothing. In a compiled step the head runs outside the
    graph. Nor can a CUDA graph capture what is of one step alone: the first step of a momentum, every step
    of Adam.

    Raises:
        TypeError, ValueError: arguments.
    """

    def __init__(
        self,
        head: nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        heads_of(type(self).__name__, head)
        super().__init__(
            _parameters(head, params),
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        self._take(head)

    def update_of(self, weight: Tensor, group: dict[str, Any]) -> updates.Update:
        momentum = float(group["momentum"])
        before = self.state[weight].get("momentum_buffer") if momentum else None
        if momentum and before is None:
            self._check_capture(weight)
        state = torch.empty_like(weight) if momentum and before is None else before
        numbers = updates.Numbers(
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            momentum=momentum,
            dampening=float(group["dampening"]),
            maximize=bool(group["maximize"]),
            nesterov=bool(group["nesterov"]),
            starts=before is None,
        )
        return updates.Update("sgd", state, None, numbers)

    def keep_state(self, weight: Tensor, update: updates.Update) -> None:
        if update.state1 is not None:
            self.state[weight]["momentum_buffer"] = update.state1


class _Adam(FusedOptimizer):
    def update_of(self, weight: Tensor, group: dict[str, Any]) -> updates.Update:
        if group["amsgrad"]:
            raise RuntimeError(f"{type(self).__name__}: expected amsgrad=False, got a group with it")
        self._check_capture(weight)
        state = self.state[weight]
        if state:
            first, second, count = state["exp_avg"], state["exp_avg_sq"], float(state["step"]) + 1
        else:
            first, second, count = torch.zeros_like(weight), torch.zeros_like(weight), 1.0
        beta1, beta2 = map(float, group["betas"])
        numbers = updates.Numbers(
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            beta1=beta1,
            beta2=beta2,
            adam_eps=float(group["eps"]),
            correction1=1 - beta1**count,
            correction2=1 - beta2**count,
            maximize=bool(group["maximize"]),
            decoupled=bool(group["decoupled_weight_decay"]),
        )
        return updates.Update("adam", first, second, numbers)

    def keep_state(self, weight: Tensor, update: updates.Update) -> None:
        state = self.state[weight]
        before = state.get("step")
        # On the host, whatever torch's own did: nothing waits for a device to know it.
        state["step"] = torch.tensor(1.0 if before is None else float(before) + 1, dtype=torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = update.state1, update.state2

    def release(self) -> None:
        super().release()
        for group in self.param_groups:
            if group["fused"] or group["capturable"]:  # kernels of torch's, which count on the device
                for weight in group["params"]:
                    state = self.state.get(weight, {})
                    if "step" in state:
                        state["step"] = state["step"].to(weight.device)


class FusedAdam(_Adam, Adam):
    """``torch.optim.Adam`` as :class:`FusedSGD` is ``torch.optim.SGD``, without amsgrad and capturable."""

    def __init__(
        self,
        head: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        heads_of(type(self).__name__, head)
        super().__init__(
            _parameters(head, params),
            lr,
            betas,
            eps,
            weight_decay,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        self._take(head)


class FusedAdamW(_Adam, AdamW):
    """``torch.optim.AdamW`` as :class:`FusedSGD` is ``torch.optim.SGD``, without amsgrad and capturable."""

    def __init__(
        self,
        head: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        params: Iterable[Any] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        heads_of(type(self).__name__, head)
        super().__init__(
            _parameters(head, params),
            lr,
            betas,
            eps,
            weight_decay,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        self._take(head)
