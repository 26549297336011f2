"""The sentences of bad input: "op: expected `argument` to ..., got ...". Used by ``functional``.

The C++ checks (csrc/checks.h) are the second line; the stable ABI can raise only RuntimeError there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from . import arguments, graphs, native, transforms
from .arguments import INT64_MAX, INT64_MIN, choice, integer, number

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: With the kernels' number. "batchmean" is a sum to them, which the number of rows divides afterwards.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2, "batchmean": 2}


#: Kinds of tensors that no kernel takes, and what to do instead. By the name of their class: to import the
#: classes takes long, and who has one has done so.
FOREIGN = {
    "DTensor": "a DTensor: give what this rank has of it, .to_local(), or all of it, .full_tensor(); the head"
    " of normface_ext.distributed.shard_head takes plain features, and has logits(x), predict(x) and"
    " accuracy(x, labels)",
    "MaskedTensor": "a MaskedTensor: give .to_tensor(value), or .get_data() and rows that are ignored",
    "UninitializedParameter": "an UninitializedParameter: run its lazy module once first",
    "UninitializedBuffer": "an UninitializedBuffer: run its lazy module once first",
}
#: Named tensors went with torch 2.13; Dynamo never took them.
_has_names: Callable[[Tensor], bool] | None = getattr(Tensor, "has_names", None)


def is_dtensor(value: Tensor) -> bool:
    """By name, as in ``FOREIGN``."""
    return type(value).__name__ == "DTensor"


def tensor(op: str, name: str, value: object) -> Tensor:
    """A plain tensor: what every op's tensors have to be. Dtype, shape and device are for others to check."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{op}: expected `{name}` to be a Tensor, got {type(value).__name__}{graphs.advice(value)}"
        )
    if type(value).__name__ in FOREIGN:
        raise TypeError(f"{op}: expected `{name}` to be a plain Tensor, got {FOREIGN[type(value).__name__]}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: expected `{name}` to be a dense Tensor, got {value.layout}")
    if value.is_nested:
        raise TypeError(f"{op}: expected `{name}` to be a dense Tensor, got a nested one")
    if _has_names is not None and not torch.compiler.is_compiling() and _has_names(value):
        raise TypeError(
            f"{op}: expected `{name}` without names, got a named tensor: .rename(None) drops them"
        )
    return value


def floating(op: str, name: str, value: object) -> Tensor:
    checked = tensor(op, name, value)
    if checked.dtype not in FLOATING:
        raise TypeError(
            f"{op}: expected `{name}` to be float64, float32, float16 or bfloat16, got {checked.dtype}"
        )
    return checked


def matrix(op: str, name: str, value: object, meaning: str) -> Tensor:
    checked = floating(op, name, value)
    if checked.dim() != 2:
        raise ValueError(f"{op}: expected `{name}` to be 2-D {meaning}, got shape {list(checked.shape)}")
    return checked


def same_device(op: str, name: str, value: Tensor, other: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(
            f"{op}: expected `{name}` on the device of `{other}` ({reference.device}), got {value.device}"
        )


# Options that several ops share: what each may be.


def eps(op: str, name: str, value: object) -> float:
    return number(op, name, value, arguments.NOT_NEGATIVE)


def exponent(op: str, name: str, value: object) -> int:
    """`p`: 1 or 2, also as a float (torch's own default is 2.0)."""
    if type(value) is int and (value == 2 or value == 1):
        return value
    try:
        p = number(op, name, value)
    except (TypeError, ValueError):
        p = 0.0
    if p not in (1.0, 2.0):
        raise ValueError(f"{op}: expected `{name}` to be 1 or 2, got {arguments.shown(value)}")
    return int(p)


def ignore_index(op: str, name: str, value: object) -> int | None:
    """The label of rows to be left out, or None where there are none."""
    return None if value is None else integer(op, name, value, INT64_MIN, INT64_MAX, kind="an int or None")


def workspace(op: str, name: str, value: object) -> int | None:
    """A budget in bytes; whether it is enough is for the plan to say."""
    return None if value is None else integer(op, name, value, 0, INT64_MAX, kind="an int or None")


def active_limit(op: str, name: str, value: object) -> int | None:
    return None if value is None else integer(op, name, value, 0, INT64_MAX, kind="an int or None")


def reduction(op: str, name: str, value: object) -> str:
    return choice(op, name, value, REDUCTIONS)


def smoothing(op: str, name: str, value: object) -> float:
    return number(op, name, value, arguments.FRACTION)


def floating_dtype(op: str, value: object) -> torch.dtype:
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{op}: expected `dtype` to be a torch.dtype, got {type(value).__name__}")
    if value not in FLOATING:
        raise TypeError(f"{op}: expected `dtype` to be float64, float32, float16 or bfloat16, got {value}")
    return value


def device(op: str, value: object) -> torch.device:
    if isinstance(value, torch.device):
        return value
    try:
        return torch.device(value)  # type: ignore[call-overload, no-any-return]
    except (TypeError, RuntimeError):
        raise ValueError(f"{op}: expected `device` to be a device, got {arguments.shown(value)}") from None


def device_or_none(op: str, value: object) -> torch.device | None:
    return None if value is None else device(op, value)


# Tensors.


def features_and_weight(op: str, x: object, weight: object) -> tuple[Tensor, Tensor]:
    """x [N, D] and weight [C, D], floating, on one device; float64 only together with float64."""
    features, agents = _head(op, x, weight, "C")
    if agents.shape[0] == 0:
        raise ValueError(f"{op}: expected `weight` to have at least one class, got shape [0, D]")
    return features, agents


def features_and_shard(op: str, x: object, weight: object, classes: int) -> tuple[Tensor, Tensor]:
    """The same of one shard of the classes, which has `classes` of them, perhaps none."""
    features, agents = _head(op, x, weight, str(classes))
    if agents.shape[0] != classes:
        raise ValueError(
            f"{op}: expected `weight` to have this rank's {classes} classes, got shape {list(agents.shape)}"
        )
    return features, agents


def _head(op: str, x: object, weight: object, classes: str) -> tuple[Tensor, Tensor]:
    features = matrix(op, "x", x, "[N, D]")
    agents = matrix(op, "weight", weight, f"[{classes}, D]")
    if features.shape[1] != agents.shape[1]:
        raise ValueError(
            f"{op}: expected `weight` to be [{classes}, {features.shape[1]}] to match `x`,"
            f" got shape {list(agents.shape)}"
        )
    if (features.dtype == torch.float64) != (agents.dtype == torch.float64):
        raise TypeError(
            f"{op}: expected `weight` and `x` to be both float64 or both not,"
            f" got {agents.dtype} and {features.dtype}"
        )
    same_device(op, "weight", agents, "x", features)
    return features, agents


def scale(op: str, value: object, x: Tensor, *, per_row: bool = False) -> tuple[Tensor | None, float]:
    """(0-d tensor, 0.0) or (None, float); `per_row`: or a tensor [N]. One of shape [1] counts as 0-d, and a
    learned scale comes within its bounds (engine/scale.py)."""
    if not isinstance(value, Tensor):
        return None, number(op, "scale", value, kind="a float or a tensor of one element")
    tensor(op, "scale", value)
    single = value.dim() <= 1 and value.numel() == 1
    rows = per_row and value.dim() == 1 and value.shape[0] == x.shape[0]
    if not (single or rows) or value.dtype not in FLOATING:
        wanted = f" or of shape [{x.shape[0]}]" if per_row else ""
        raise ValueError(
            f"{op}: expected `scale` to be a float or a floating tensor of one element{wanted},"
            f" got {value.dtype} of shape {list(value.shape)}"
        )
    same_device(op, "scale", value, "x", x)
    if not single:
        return value.contiguous(), 0.0
    bounds = getattr(value, "scale_bounds", None)
    if bounds is not None:
        return bounded(value, *bounds), 0.0
    return (value if value.dim() == 0 else value.reshape(())), 0.0


def bounded(scale: Tensor, low: float, high: float) -> Tensor:
    """The one element as a 0-d tensor in [low, high].

    The gradient is not masked, as in Caffe's Scale layer: a scale at a bound can come back.
    """
    # A Parameter as it is: no trace is looking, and no transform has wrapped it.
    plain = type(scale) is nn.Parameter and scale.is_cpu and not torch.compiler.is_compiling()
    if plain and low <= scale.item() <= high:
        return scale.squeeze()
    # scale - scale is 0: the value is the bound itself, and the slope is 1. Infinity has no such 0.
    none = (scale - scale.detach()).nan_to_num(0.0)
    return (scale.detach().clamp(low, high) + none).reshape(())


def label_tensor(op: str, value: object, name: str = "labels") -> Tensor:
    checked = tensor(op, name, value)
    if checked.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: expected `{name}` to be int64 or int32, got {checked.dtype}")
    return checked


def label_rows(op: str, value: object, x: Tensor, name: str = "labels") -> Tensor:
    """labels [N] as int64, of any value."""
    checked = label_tensor(op, value, name)
    if checked.dim() != 1 or checked.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: expected `{name}` to have shape [{x.shape[0]}], got {list(checked.shape)}")
    same_device(op, name, checked, "x", x)
    return checked if checked.dtype == torch.int64 else checked.long()


def has_values(value: Tensor) -> bool:
    """Whether a tensor's values can be read at all: not of a fake or meta tensor, nor while compiling or
    while a CUDA graph is captured, nor of a batch under torch.func.vmap."""
    if torch.compiler.is_compiling() or value.is_meta or capturing(value):
        return False
    if type(value) is Tensor and not transforms.watched():
        return True  # nothing wraps it
    return not (is_fake(value) or transforms.batched(value))


_rehearsing = False


@contextmanager
def rehearsal() -> Iterator[None]:
    """Within it a step on CUDA runs as it would while captured, so that what a capture launches is loaded."""
    global _rehearsing
    before, _rehearsing = _rehearsing, True
    try:
        yield
    finally:
        _rehearsing = before


def capturing(value: Tensor) -> bool:
    """Whether what happens to a tensor now goes into a CUDA graph, or rehearses what will."""
    if not value.is_cuda or _rehearsing:
        return value.is_cuda
    if value.get_device() == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(value.device):  # each device has a current stream
        return torch.cuda.is_current_stream_capturing()


def readable(value: Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return value.device.type == "cpu" and has_values(value)


def ignored(ignore_index: int | None) -> int:
    """For kernels: where ``ignore_index`` is None, what no label is."""
    return INT64_MIN if ignore_index is None else ignore_index


def labels(
    op: str, value: object, x: Tensor, classes: int, ignore_index: int | None, name: str = "labels"
) -> Tensor:
    """labels [N] as int64, in [0, C) or ignore_index. On CUDA the range is checked by the kernel."""
    checked = label_rows(op, value, x, name)
    if readable(checked):
        label_range(op, checked, classes, ignore_index, name)
    return checked


def label_range(op: str, value: Tensor, classes: int, ignore_index: int | None, name: str = "labels") -> None:
    if value.numel() == 0 or native.labels_within(value, classes):  # as most are: nothing wrong or ignored
        return
    bad = (value < 0) | (value >= classes)
    if ignore_index is not None:
        bad &= value != ignore_index
    if bad.any():
        row = int(bad.nonzero()[0])
        exempt = "" if ignore_index is None else f" or ignore_index ({ignore_index})"
        raise IndexError(
            f"{op}: expected `{name}` in [0, {classes}){exempt}, got {int(value[row])} at row {row}"
        )


def finite_rows(
    op: str,
    name: str,
    value: Tensor,
    counted: Tensor | None = None,
    row: Callable[[int], object] = lambda index: index,
) -> None:
    """ValueError naming the rows of [N, ...] with NaN or infinity, of those that are `counted` [N]; `row` is
    what an index is called. A 0-d tensor has none. Waits for the device. In a traced or captured step the
    device asserts, without names; of a fake or meta tensor there is nothing to see."""
    finite = value.detach().isfinite()
    bad = ~(finite.flatten(1).all(1) if finite.dim() > 1 else finite)
    if counted is not None:
        bad = bad & counted
    sentence = f"{op}: expected `{name}` to be finite, got NaN or infinity"
    if torch.compiler.is_compiling() or capturing(value):
        torch._assert_async(~bad.any(), sentence)
    elif transforms.batched(value):
        raise ValueError(f"{op}: expected `check_finite` False under torch.func.vmap, got True")
    elif has_values(value) and bad.any():
        if bad.dim() == 0:
            raise ValueError(sentence)
        rows = bad.nonzero()[:, 0].tolist()
        shown = ", ".join(str(row(index)) for index in rows[:4])
        more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
        raise ValueError(f"{sentence} in {'row' if len(rows) == 1 else 'rows'} {shown}{more}")


def weighed(kept: Tensor, sample_weight: Tensor | None) -> Tensor:
    """Which rows [N] count: a row of weight 0 is an ignored one."""
    return kept if sample_weight is None else kept & (sample_weight != 0)


def finite_operands(
    op: str,
    x: Tensor,
    weight: Tensor,
    kept: Tensor,
    scale: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> None:
    """``finite_rows`` of what a head is given. Of x and sample_weight the rows that are `kept` [N] count; in
    x, those of weight 0 do not."""
    finite_rows(op, "x", x, weighed(kept, sample_weight))
    finite_rows(op, "weight", weight)
    if scale is not None:
        finite_rows(op, "scale", scale)
    if sample_weight is not None:
        finite_rows(op, "sample_weight", sample_weight, kept)


def factors(op: str, name: str, value: object, count: int) -> Tensor:
    checked = floating(op, name, value)
    if checked.dim() != 1 or checked.shape[0] != count:
        raise ValueError(f"{op}: expected `{name}` to have shape [{count}], got {list(checked.shape)}")
    if checked.requires_grad:
        raise ValueError(f"{op}: expected `{name}` not to require a gradient, got one that does")
    return checked


#: Why losses of rows with no softmax of the kernels have no such options (``Options.WHY_NOT``).
NO_SOFTMAX = {
    "class_weight": "it is a factor of the row's loss, as sample_weight=class_weight[labels] is",
    "label_smoothing": "its loss is no cross entropy: there is no distribution over the classes to smooth",
}


def weights(op: str, name: str, value: object, x: Tensor, count: int) -> Tensor | None:
    """Constant factors [count], in the accumulator dtype of x."""
    if value is None:
        return None
    if isinstance(value, tuple):
        raise TypeError(
            f"{op}: expected `{name}` to be a Tensor of shape [{count}], got a tuple. A miner's indices_tuple"
            " has to be converted: sample_weight=loss_and_miner_utils.convert_to_weights(indices_tuple,"
            ' labels, dtype=x.dtype), with reduction="batchmean" for the mean of pytorch-metric-learning'
        )
    checked = factors(op, name, value, count)
    same_device(op, name, checked, "x", x)
    return checked.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
