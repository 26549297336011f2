"""torch.func and forward-mode derivatives of the ops.

A plain call of an op goes to its autograd Function and pays for nothing here. Where a transform looks on,
:func:`through` makes four Functions of that one which transforms can follow: the op, its gradients, the
gradients of those, and its derivative along a direction. Each of them runs the op's own Function on plain
tensors, once every level of the transforms has been taken off: the kernels and the second derivatives are the
same ones. A batched operand means a loop over the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .autograd import Given

#: Which of the inputs.
Mask = tuple[bool, ...]


def watched() -> bool:
    """Whether a transform of torch.func looks on, or a level of forward-mode derivatives is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# The compiler asks while it traces, when the transforms of what it traces are on, and guards on them.
watched._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse(op: str) -> None:
    """For what has backward gradients alone."""
    if watched():
        raise RuntimeError(
            f"{op}: expected no torch.func transform and no forward-mode derivatives around it, of which"
            " it has none; it has first gradients by backward()"
        )


def batched(value: Tensor) -> bool:
    """Whether it stands for a batch under torch.func.vmap: nobody can look at its values."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


@dataclass(frozen=True, eq=False)
class Op:
    """An op as a function of tensors alone, some perhaps None. The leading ``inputs`` of them may have
    gradients, of the leading ``outputs`` of its results, and second ones."""

    name: str
    call: Callable[..., tuple[Tensor, ...]]
    inputs: int
    outputs: int


def through(
    name: str,
    function: type[Function],
    tensors: Given,
    rest: tuple[Any, ...],
    *,
    inputs: int,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """``function.apply(*tensors, *rest)`` as a tuple, for transforms to follow."""

    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=f"{name}: torch.compile follows no transform of torch.func through it")

    def call(*given: Tensor | None) -> tuple[Tensor, ...]:
        made = function.apply(*given, *rest)
        return made if isinstance(made, tuple) else (made,)

    result: tuple[Tensor, ...] = _Call.apply(Op(name, call, inputs, outputs), (), *tensors)
    return result


def constant(name: str, call: Callable[..., Tensor], tensors: Given, rest: tuple[Any, ...]) -> Tensor:
    """``call(*tensors, *rest)``, which has no gradient."""
    made: Tensor = _Call.apply(Op(name, lambda *given: (call(*given, *rest),), 0, 0), (), *tensors)[0]
    return made


def _eagerly(call: Callable[..., Any], *given: Any) -> Any:
    """Out of the compiler's sight, which looks away from the frame around this, and no further: a compiled
    Function is not differentiable twice."""
    dynamo = sys.modules.get("torch._dynamo")
    return call(*given) if dynamo is None else dynamo.disable(call)(*given)


# On plain tensors -----------------------------------------------------------------------------------


def _plain(op: Op, values: Given) -> Given:
    """The values for kernels: forward mode has zeros without memory, and torch.autograd.functional batches of
    its own, which know nothing of the loop."""
    batch = torch._C._dispatch_key_parse("Batched")
    if any(t is not None and torch._C._dispatch_keys(t).has(batch) for t in values):
        raise RuntimeError(
            f"{op.name}: expected no `vectorize` with forward mode of torch.autograd.functional, which is not"
            " available; use torch.func.jacfwd"
        )
    return tuple(
        torch.zeros(t.shape, dtype=t.dtype, device=t.device) if t is not None and t._is_zerotensor() else t
        for t in values
    )


def _run(op: Op, tensors: Given, of: Mask) -> tuple[Given, tuple[Tensor, ...]]:
    """(the inputs as leaves of a graph, those `of` which a gradient is wanted; the results)"""
    leaves = tuple(
        None if t is None else t.detach().requires_grad_(wanted)
        for t, wanted in zip(tensors[: op.inputs], of, strict=True)
    )
    return leaves, op.call(*leaves, *tensors[op.inputs :])[: op.outputs]


def _grad(totals: Given, wanted: Given, upstream: Given, *, graph: bool = False) -> Given:
    """torch.autograd.grad of what is there by what is there and has a graph; None for the rest."""
    present = [t for t in wanted if t is not None and t.requires_grad]
    pairs = [
        (t, u)
        for t, u in zip(totals, upstream, strict=True)
        if t is not None and u is not None and t.requires_grad
    ]
    if not present or not pairs:
        found = iter([torch.zeros_like(t) for t in present])
    else:
        found = iter(
            torch.autograd.grad(
                [t for t, _ in pairs],
                present,
                [u for _, u in pairs],
                create_graph=graph,
                materialize_grads=True,
            )
        )
    return tuple(next(found) if t is not None and t.requires_grad else None for t in wanted)


def _gradients_of(op: Op, of: Mask, upstream: Given, tensors: Given) -> Given:
    with torch.enable_grad():
        leaves, results = _run(op, tensors, of)
        return _grad(results, leaves, upstream)


def _second_of(op: Op, of: Mask, upstream: Given, tensors: Given, along: Given) -> Given:
    """The gradients of <along, the gradients>: of the upstream and, `of` which they are wanted, of the
    inputs."""
    with torch.enable_grad():
        moving = tuple(v is not None for v in along)
        leaves, results = _run(op, tensors, tuple(a or b for a, b in zip(of, moving, strict=True)))
        factors = tuple(None if u is None else u.detach().requires_grad_() for u in upstream)
        first = _grad(results, leaves, factors, graph=True)
        wanted = tuple(t if need else None for t, need in zip(leaves, of, strict=True))
        return _grad(first, factors + wanted, along)


def _along_of(op: Op, tensors: Given, along: Given) -> Given:
    """The derivative of the results along a direction."""
    moving = tuple(v is not None for v in along)
    results = _run(op, tensors, (False,) * op.inputs)[1]
    if len(results) == 1 and results[0].dim() == 0:  # the first gradients are enough
        given = _gradients_of(op, moving, (torch.ones_like(results[0]),), tensors)
        slopes = [
            (g.double() * v.double()).sum()
            for g, v in zip(given, along, strict=True)
            if g is not None and v is not None
        ]
        return (torch.stack(slopes).sum().to(results[0].dtype),)
    nothing = tuple(torch.zeros_like(r) for r in results)
    return _second_of(op, (False,) * op.inputs, nothing, tensors, along)[: op.outputs]


# As Functions ---------------------------------------------------------------------------------------


class _Looped(Function):
    """A Function of (op, mask, *tensors), whose batched operands are gone through one by one."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], op: Op, of: Mask, *tensors: Tensor | None) -> Any:
        def element(index: int) -> Any:
            given = (
                t if t is None or d is None else t.select(d, index)
                for t, d in zip(tensors, in_dims[2:], strict=True)
            )
            return cls.apply(op, of, *given)

        rows = [element(index) for index in range(info.batch_size)]
        stacked = tuple(None if each[0] is None else torch.stack(each) for each in zip(*rows, strict=True))
        return stacked, tuple(None if s is None else 0 for s in stacked)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op, ctx.of, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)


class _OfResults(_Looped):
    """One that returns the op's results, or what has their shapes."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _Looped.setup_context(ctx, inputs, output)
        results, constants = output[: ctx.op.outputs], output[ctx.op.outputs :]
        ctx.mark_non_differentiable(*constants)
        ctx.results, ctx.constants = [(r.shape, r.dtype) for r in results], len(constants)

    @staticmethod
    def filled(ctx: Any, upstream: Given) -> Given:
        """With zeros for the results that nothing depends on."""
        like = next(u for u in upstream if u is not None)
        return tuple(
            like.new_zeros(shape, dtype=dtype) if u is None else u
            for u, (shape, dtype) in zip(upstream, ctx.results, strict=False)
        )


def _no_more(op: Op) -> NoReturn:
    raise RuntimeError(
        f"{op.name}: third derivatives, and second ones by forward mode alone, are not available under"
        f" torch.func; use torch.func.hessian, or transform normface_ext.reference.{op.name}"
    )


class _Call(_OfResults):
    """(tensors) -> the op's results"""

    @staticmethod
    def forward(op: Op, of: Mask, *tensors: Tensor | None) -> Any:
        return _eagerly(op.call, *tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        op, tensors, given = ctx.op, ctx.saved_tensors, _OfResults.filled(ctx, upstream)
        found = _Gradients.apply(op, ctx.needs_input_grad[2 : 2 + op.inputs], *given, *tensors)
        return None, None, *found, *[None] * (len(tensors) - op.inputs)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *along: Tensor | None) -> Any:
        op = ctx.op
        moved = _Along.apply(op, (), *ctx.saved_tensors, *along[: op.inputs])
        return *moved, *[None] * ctx.constants


class _Gradients(_Looped):
    """(upstream, tensors) -> the gradients of the inputs of the mask"""

    @staticmethod
    def forward(op: Op, of: Mask, *given: Tensor | None) -> Any:
        given = _plain(op, given)
        return _eagerly(_gradients_of, op, of, given[: op.outputs], given[op.outputs :])

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> Any:
        op, given = ctx.op, ctx.saved_tensors
        first = 2 + op.outputs
        of = ctx.needs_input_grad[first : first + op.inputs]
        found = _Second.apply(op, of, *given, *along)
        return None, None, *found, *[None] * (len(given) - op.outputs - op.inputs)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *moving: Tensor | None) -> Any:
        """By the symmetry of second derivatives."""
        op, given = ctx.op, ctx.saved_tensors
        factors, along = moving[: op.outputs], moving[op.outputs : op.outputs + op.inputs]
        parts = []
        if any(v is not None for v in along):
            parts.append(_Second.apply(op, ctx.of, *given, *along)[op.outputs :])
        if any(u is not None for u in factors):
            filled = (torch.zeros_like(g) if u is None else u for u, g in zip(factors, given, strict=False))
            parts.append(_Gradients.apply(op, ctx.of, *filled, *given[op.outputs :]))
        return tuple(None if each[0] is None else sum(each) for each in zip(*parts, strict=True))


class _Second(_Looped):
    """(upstream, tensors, along) -> the gradients of <along, the gradients>: of the upstream, and of the
    inputs of the mask"""

    @staticmethod
    def forward(op: Op, of: Mask, *given: Tensor | None) -> Any:
        given = _plain(op, given)
        tensors, along = given[op.outputs : -op.inputs], given[-op.inputs :]
        return _eagerly(_second_of, op, of, given[: op.outputs], tensors, along)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        _no_more(ctx.op)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        _no_more(ctx.op)


class _Along(_OfResults):
    """(tensors, along) -> the derivative of the results along that"""

    @staticmethod
    def forward(op: Op, of: Mask, *given: Tensor | None) -> Any:
        given = _plain(op, given)
        return _eagerly(_along_of, op, given[: -op.inputs], given[-op.inputs :])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        op, given = ctx.op, ctx.saved_tensors
        tensors, along = given[: -op.inputs], given[-op.inputs :]
        factors, needed = _OfResults.filled(ctx, upstream), ctx.needs_input_grad
        of_along = _Gradients.apply(op, needed[-op.inputs :], *factors, *tensors)
        of_tensors = _Second.apply(op, needed[2 : 2 + op.inputs], *factors, *tensors, *along)
        constants = [None] * (len(tensors) - op.inputs)
        return None, None, *of_tensors[op.outputs :], *constants, *of_along

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        _no_more(ctx.op)
