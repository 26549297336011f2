"""A head's forward and backward as two CUDA graphs: a launch each, whatever the host is doing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .engine import checks


class _Input(NamedTuple):
    """What of an argument is the same in every call that goes by the graph."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, value: Tensor) -> _Input:
        return cls(value.shape, value.dtype, value.device, value.requires_grad)


class _Step(nn.Module):
    """What is captured: torch replaces its ``forward``, and the head keeps its own."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.training = head.training

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.head(x, labels)
        return loss


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


def _is_plain(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in (bool, int, float, str)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """State that forward passes move, as a running mean is, is afterwards what it was."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


class Graphed:
    """``(x, labels) -> loss`` by the graphs of :func:`graphed`, or by ``head`` itself."""

    def __init__(self, head: nn.Module, x: Tensor, labels: Tensor) -> None:
        self.head = head
        self._inputs = _Input.of(x), _Input.of(labels)
        self._training, self._cast = head.training, _autocast()
        self._captured, self._options = self._tensors(), getattr(head, "options", None)
        self._constants = self._numbers()
        self._calls = 0
        given = x.detach().clone().requires_grad_(x.requires_grad), labels.clone()
        enabled, dtype = self._cast
        with _buffers_kept(head), checks.rehearsal():
            with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
                step = torch.cuda.make_graphed_callables(_Step(head), given)
            self._step = cast(Callable[[Tensor, Tensor], Tensor], step)
            self._places = self._places_of_gradients(*given)

    def _tensors(self) -> list[tuple[int, torch.Size, bool]]:
        """Where the head's lie, which is what a graph knows of them."""
        tensors = [*self.head.parameters(), *self.head.buffers()]
        return [(t.data_ptr(), t.shape, t.requires_grad) for t in tensors]

    def _numbers(self) -> list[tuple[str, object]]:
        """The head's and its margin's, such as a fixed scale, which are constants in a graph."""
        held = (item for module in self.head.modules() for item in vars(module).items())
        return [(name, value) for name, value in held if _is_plain(value)]

    def _places_of_gradients(self, x: Tensor, labels: Tensor) -> frozenset[int]:
        """Where the graph writes them."""
        loss = self._step(x, labels)
        leaves = [p for p in self.head.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss.sum(), leaves) if leaves else ()
        return frozenset(g.data_ptr() for g in gradients if g.numel() > 0)

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        if not self._serves(x, labels):
            plain: Tensor = self.head(x, labels)
            return plain
        same_options = getattr(self.head, "options", None) is self._options
        same_tensors = self._tensors() == self._captured
        if not (same_options and same_tensors and self._numbers() == self._constants):
            raise RuntimeError(
                "graphed: expected the head as it was captured, got one whose parameters, buffers, numbers or"
                " options have been replaced; call graphed again"
            )
        self._calls += 1
        if x.requires_grad:  # whatever gets the features' gradient may keep it
            x = x.view_as(x)
            x.register_hook(torch.clone)
        call, loss = self._calls, self._step(x, labels)

        def before_backward(_: Tensor) -> None:
            if call != self._calls:
                raise RuntimeError(
                    "graphed: expected the backward pass of a call before the next, which takes its memory"
                )
            self._keep_gradients()

        if loss.requires_grad:
            loss.register_hook(before_backward)
        return loss.clone()  # the graph's own is overwritten by the next call

    def _serves(self, x: Tensor, labels: Tensor) -> bool:
        return (
            torch.is_grad_enabled()
            and (_Input.of(x), _Input.of(labels)) == self._inputs
            and self.head.training == self._training
            and _autocast() == self._cast
        )

    def _keep_gradients(self) -> None:
        """A parameter's ``.grad`` may be the very memory of the graph, which is about to be written again:
        what was accumulated there moves out of the way."""
        for parameter in self.head.parameters():
            if parameter.grad is not None and parameter.grad.data_ptr() in self._places:
                parameter.grad = parameter.grad.clone()


def graphed(head: nn.Module, x: Tensor, labels: Tensor) -> Graphed:
    """``head(x, labels)`` whose forward and backward are one launch each: they are captured as CUDA graphs
    (``torch.cuda.make_graphed_callables``), for steps that the host is too slow for.

    .. code-block:: python

        head_loss = nf.graphed(head, features, labels)  # once, a batch as in training
        loss = head_loss(backbone(images), labels)      # in the place of head(...)
        loss.backward()

    Results are those of the head. What a graph cannot know goes by the head itself, so that every call may be
    made this way: a batch of another size or dtype, labels of another dtype, features that ask for a gradient
    where the sample's did not, ``eval()``, ``torch.no_grad()``, another autocast. Tensors are read at every
    call: the weight, a learned scale, class weights, margins that are tensors or have a state. Numbers, a
    fixed scale above all, are those of the capture; setting one or an option raises afterwards, as does a
    head that was moved or resized. Gradients are accumulated as ever; what ``torch.autograd.grad`` gives for
    a parameter is the graph's memory, which the next backward pass writes. Hooks of the head do not run.

    Args:
        head: a layer called (features, labels) -> loss, on a CUDA device. Its state and its gradients stay as
            they are.
        x: [N, D] features as they will come: shape, dtype, ``requires_grad``. Their values do not matter.
        labels: [N] labels as they will come, in range. A label out of range ends the process's use of the
            GPU, as in any kernel.

    Inside ``torch.autocast("cuda")`` the step is captured under it, and has to be called under it.

    Raises:
        TypeError: a head that is no module, arguments that are no tensors.
        ValueError: anything that is not on a CUDA device; a head whose classes are spread over processes.
        RuntimeError: when called, after what was captured has been replaced; in a backward pass that comes
            after another call. Second derivatives raise in torch.
    """
    if not isinstance(head, nn.Module):
        raise TypeError(f"graphed: expected `head` to be a module, got {type(head).__name__}")
    for name, value in (("x", x), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"graphed: expected `{name}` to be a tensor, got {type(value).__name__}")
    spread = type(head).__module__.startswith(f"{__package__}.distributed")
    if spread or any(map(checks.is_dtensor, head.parameters())):
        raise ValueError("graphed: expected `head` with all of its classes, got one spread over processes")
    _on_cuda(head, x, labels)
    return Graphed(head, x, labels)


def _on_cuda(head: nn.Module, x: Tensor, labels: Tensor) -> None:
    named = [("x", x), ("labels", labels), *(("head", p) for p in head.parameters())]
    for name, value in named:
        if not value.is_cuda:
            raise ValueError(f"graphed: expected `{name}` on a CUDA device, got {value.device}")
