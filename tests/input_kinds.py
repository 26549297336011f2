"""Every public function and layer with a sample of each tensor it takes, and the kinds of tensors a user may
hand it instead. They are found by introspection: a new function or layer is among them by itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import normface_ext as nf

N, D, C = 4, 6, 9

# The calls -------------------------------------------------------------------------------------------

#: By the name of the argument. `features` of the layers is the ops' `x`.
SAMPLES: dict[str, Callable[[], Tensor]] = {
    "x": lambda: _rows(N, D, seed=0),
    "features": lambda: _rows(N, D, seed=0),
    "weight": lambda: _rows(C, D, seed=1),
    "labels": lambda: torch.tensor([0, C - 1, 3, 3]),
    "scale": lambda: torch.tensor(8.0),
    "bias": lambda: torch.tensor(-2.0),
    "neg_margin": lambda: torch.tensor(1.5),
    "sample_weight": lambda: torch.tensor([1.0, 0.5, 2.0, 1.0]),
    "labels_b": lambda: torch.tensor([1, 2, 3, 0]),
    "lam": lambda: torch.tensor(0.25),
    "class_weight": lambda: torch.linspace(0.5, 1.5, C),
    "a": lambda: _rows(N, D, seed=0),
    "b": lambda: _rows(N, D, seed=2),
    "same": lambda: torch.tensor([True, False, True, False]),
    "anchor": lambda: _rows(N, D, seed=0),
    "positive": lambda: _rows(N, D, seed=2),
    "negative": lambda: _rows(N, D, seed=3),
}
#: Arguments that are given with another one only.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("inner_distance", "labels"): {"update_center_only": True},
    ("InnerDistance", "labels"): {"update_center_only": True},
}
#: Tensors that are given together with others, where there are such.
TOGETHER = {"sample_weight": ["labels"], "labels_b": ["labels", "lam"], "lam": ["labels", "labels_b"]}
#: What a layer's constructor needs.
SIZES = {"in_features": D, "num_classes": C, "out_features": C, "counts": [3] * C}
#: Layers that hand their input on: it is for what they hold to judge.
HANDING_ON = {"MirrorFace"}


def _rows(rows: int, dim: int, seed: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Call:
    """A public function, or a layer's forward, and one of its tensors."""

    name: str
    argument: str
    arguments: tuple[str, ...]  # all the tensors that are given
    make: Callable[[Mapping[str, Any], torch.device], Callable[..., Any]]
    number: bool  # a float is fine as well

    @property
    def id(self) -> str:
        return f"{self.name}-{self.argument}"

    @property
    def takes_gradient(self) -> bool:
        constants = {"sample_weight", "class_weight", "neg_margin", "lam"}
        return self.argument not in constants and SAMPLES[self.argument]().is_floating_point()

    @property
    def names(self) -> set[str]:
        """What a sentence may call the argument."""
        return {self.argument, "x" if self.argument == "features" else self.argument}

    def samples(self, device: torch.device) -> dict[str, Tensor]:
        return {name: SAMPLES[name]().to(device) for name in self.arguments}

    def __call__(self, given: Mapping[str, Any], device: torch.device, training: bool = True) -> Any:
        made = self.make(BESIDE.get((self.name, self.argument), {}), device)
        if isinstance(made, nn.Module):
            made.train(training)
        return made(**given)


def _tensors(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that may be tensors, by the text of their annotations."""
    signature = inspect.signature(function)
    return {n: p for n, p in signature.parameters.items() if "Tensor" in str(p.annotation)}


def _calls_of(name: str, function: Callable[..., Any], make: Any) -> Iterator[Call]:
    parameters = _tensors(function)
    needed = [n for n, p in parameters.items() if p.default is p.empty]
    for argument, parameter in parameters.items():
        beside = [other for other in TOGETHER.get(argument, []) if other in parameters]
        given = tuple(dict.fromkeys([*needed, *beside, argument]))
        yield Call(name, argument, given, make, "float" in str(parameter.annotation))


def _function_maker(function: Callable[..., Any]) -> Any:
    return lambda beside, device: lambda **given: function(**given, **beside)


def made(layer: type[nn.Module], **options: Any) -> nn.Module:
    """A layer or a margin of the samples' sizes, the same at every call."""
    wanted = inspect.signature(layer).parameters.values()
    sizes = {p.name: SIZES[p.name] for p in wanted if p.default is p.empty and p.name in SIZES}
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        return layer(**sizes, **options)


def forward_samples(layer: type[nn.Module]) -> dict[str, Tensor]:
    """What its forward is given: all it needs, and labels."""
    tensors = _tensors(layer.forward).items()
    return {
        n: SAMPLES[n]()
        for n, p in tensors
        if p.default is p.empty or (n == "labels" and layer is not nf.InnerDistance)
    }


def _layer_maker(layer: type[nn.Module]) -> Any:
    return lambda beside, device: made(layer, **beside).to(device)


def layers() -> dict[str, type[nn.Module]]:
    """The public layers: modules with a forward of their own. Margins are modules without."""
    found = {name: getattr(place, name) for place in (nf, nf.recipes) for name in place.__all__}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.forward is not nn.Module.forward
        and name not in HANDING_ON
    }


def margins() -> dict[str, type[nn.Module]]:
    """The public margins that are modules, whose forward nobody calls."""
    found = {name: getattr(place, name) for place in (nf, nf.recipes) for name in place.__all__}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, nf.BatchMargin) and value is not nf.BatchMargin
    }


def calls() -> list[Call]:
    made: list[Call] = []
    for name in nf.functional.__all__:
        function = getattr(nf.functional, name)
        made += _calls_of(name, function, _function_maker(function))
    for name, layer in layers().items():
        made += _calls_of(name, layer.forward, _layer_maker(layer))
    return made


# The kinds -------------------------------------------------------------------------------------------


class Plain(Tensor):
    """A subclass that changes nothing."""


class Override(Tensor):
    """A user's __torch_function__ subclass."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapper(Tensor):
    """A __torch_dispatch__ subclass that holds another tensor, as torchao's and many a logger do."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bare = tree_map_only(Wrapper, lambda t: t.held, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*bare[0], **bare[1]))


def _functional(t: Tensor) -> Tensor:
    torch._enable_functionalization(reapply_views=True)
    try:
        return torch._to_functional_tensor(t)
    finally:
        torch._disable_functionalization()


def _offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(3), t.flatten(), t.new_zeros(2)])[3 : 3 + t.numel()].view(t.shape)


def _overlapping(t: Tensor) -> Tensor:
    """Rows (or numbers) that share memory with each other."""
    return t.as_strided(t.shape, (1,) * t.dim())


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.detach().clone()


def _imaginary(t: Tensor) -> Tensor:
    """A view into complex memory, with the negative bit of its conjugate."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


floating = torch.is_floating_point


def anything(t: Tensor) -> bool:
    return True


def columns(t: Tensor) -> bool:
    return t.dim() > 1


def listed(t: Tensor) -> bool:
    return t.dim() > 0


#: Kinds that work as a plain copy of their values does: (which tensors there are such of, the maker).
WORKING: dict[str, tuple[Callable[[Tensor], bool], Callable[[Tensor], Any]]] = {
    "a view with gaps": (listed, lambda t: torch.stack([t, t], -1)[..., 0]),
    "transposed": (columns, lambda t: t.t().contiguous().t()),
    "backwards in memory": (listed, lambda t: t.flip(0).contiguous().flip(0)),
    "expanded": (listed, lambda t: t[:1].expand_as(t)),
    "overlapping": (listed, _overlapping),
    "an offset into storage": (anything, _offset),
    "the negative bit": (lambda t: t.dtype != torch.bool, lambda t: torch._neg_view(-t)),
    "the imaginary part": (floating, _imaginary),
    "a plain subclass": (anything, lambda t: t.as_subclass(Plain)),
    "a __torch_function__ subclass": (anything, lambda t: t.as_subclass(Override)),
    "a Parameter": (floating, lambda t: nn.Parameter(t.detach().clone(), requires_grad=False)),
}
#: The same, of which no gradient is asked for.
WITHOUT_GRADIENT: dict[str, tuple[Callable[[Tensor], bool], Callable[[Tensor], Any]]] = {
    "an inference tensor": (anything, _inference),
    "a FunctionalTensor": (anything, _functional),
    "a __torch_dispatch__ subclass": (anything, Wrapper),
    "memory of NumPy": (anything, lambda t: torch.from_numpy(t.cpu().numpy().copy()).to(t.device)),
    "shared memory": (anything, lambda t: t.clone().share_memory_()),
}
#: NumPy's, where a number is taken.
NUMBERS: list[Callable[[float], Any]] = [np.float16, np.float32, np.float64, np.array, np.int64]


def _masked(t: Tensor) -> Any:
    from torch.masked import masked_tensor

    return masked_tensor(t, torch.ones_like(t, dtype=torch.bool))


def _quantized(t: Tensor) -> Tensor:
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)


def _compressed(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: make(t if t.dim() > 1 else t.reshape(1, -1))


def _nested(layout: torch.layout) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.nested.nested_tensor([t, t], layout=layout)


#: Kinds that are refused by a sentence.
REFUSED: dict[str, tuple[Callable[[Tensor], bool], Callable[[Tensor], Any]]] = {
    "sparse COO": (anything, Tensor.to_sparse),
    "sparse CSR": (anything, _compressed(Tensor.to_sparse_csr)),
    "sparse CSC": (anything, _compressed(Tensor.to_sparse_csc)),
    "sparse BSR": (anything, _compressed(lambda t: t.to_sparse_bsr((1, 1)))),
    "MKL-DNN": (lambda t: floating(t) and t.dim() > 0, Tensor.to_mkldnn),
    "quantised": (floating, _quantized),
    "complex": (anything, lambda t: t.to(torch.complex64)),
    "float8": (floating, lambda t: t.to(torch.float8_e4m3fn)),
    "int8": (anything, lambda t: t.to(torch.int8)),
    "nested": (listed, _nested(torch.strided)),
    "jagged": (listed, _nested(torch.jagged)),
    "masked": (floating, _masked),
    "a lazy parameter": (anything, lambda t: nn.UninitializedParameter(requires_grad=False)),
    "an array": (listed, lambda t: t.cpu().numpy()),
    "a list": (listed, lambda t: t.tolist()),
    "a string": (anything, lambda t: "x"),
    "a module": (anything, lambda t: nn.Linear(1, 1)),
}
