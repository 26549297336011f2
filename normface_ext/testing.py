"""What the tests judge with, for anyone who extends the library.

The truth is ``normface_ext.reference`` in float64. The tolerance is earned, not guessed: a kernel may
be as wrong as plain PyTorch is in the same dtype, times a small factor, plus a hair of machine epsilon.

    assert_matches_reference(nf.functional.normalize, nf.reference.normalize, [x], "normalize")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: What the rows of ``make_rows`` are, in turn.
ROW_KINDS = ("plain", "twin", "opposite", "zero", "huge", "tiny", "spike", "ones")
#: Factors of the huge and the tiny rows: x^2 has no float32 value there, in float16 not even a sum of x.
HUGE = {torch.float64: 1e160, torch.float32: 1e19, torch.float16: 1e4, torch.bfloat16: 1e19}
TINY = {torch.float64: 1e-160, torch.float32: 1e-19, torch.float16: 1e-4, torch.bfloat16: 1e-19}

Outputs = Tensor | tuple[Tensor, ...]


def make_rows(
    rows: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    kinds: Sequence[str] = ROW_KINDS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Rows that hurt, [rows, dim]: row i is of kind ``kinds[i % len(kinds)]``.

    "plain" is Gaussian with a length anywhere in [1/8, 8], "twin" and "opposite" are the plain row
    before them times 2 and -0.5 (cosines +1 and -1), "zero" is zero, "huge" and "tiny" are Gaussian
    times ``HUGE`` and ``TINY``, "spike" has one entry a thousand times the others, "ones" is constant.

    Raises:
        ValueError: a kind that is none of ``ROW_KINDS``.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    lengths = 8.0 ** (2 * torch.rand(rows, generator=generator, dtype=torch.float64) - 1)
    result = torch.empty_like(gaussian)
    plain = torch.ones(dim, dtype=torch.float64)
    for i in range(rows):
        kind = kinds[i % len(kinds)]
        if kind == "plain":
            # Rounded first, so that its twin and its opposite are exact multiples of it.
            plain = (gaussian[i] * lengths[i] / math.sqrt(max(1, dim))).to(dtype).double()
            result[i] = plain
        elif kind == "twin":
            result[i] = 2 * plain
        elif kind == "opposite":
            result[i] = -0.5 * plain
        elif kind == "zero":
            result[i] = 0
        elif kind == "huge":
            result[i] = gaussian[i].clamp(-3, 3) * HUGE[dtype]
        elif kind == "tiny":
            result[i] = gaussian[i] * TINY[dtype]
        elif kind == "spike":
            result[i] = gaussian[i] * 1e-3
            if dim:
                result[i, i % dim] = 1.0
        elif kind == "ones":
            result[i] = 1
        else:
            raise ValueError(f"make_rows: expected `kinds` among {', '.join(ROW_KINDS)}, got {kind!r}")
    return result.to(dtype).to(device)


def assert_close_to_truth(
    actual: Tensor,
    truth64: Tensor,
    plain: Tensor | None,
    name: str,
    *,
    factor: float = 2.0,
    floor: float = 8.0,
    dim: int | None = -1,
    terms: Tensor | None = None,
    eps: float | None = None,
    tiny: float = 0.0,
) -> float:
    """Every element of ``actual`` is as close to the truth as plain PyTorch comes in the same dtype.

    allowed = factor * (largest error of ``plain``) + floor * epsilon * (largest finite ``|truth64|`` or
    ``|terms|``) + tiny, each over the element's row along ``dim`` (``None``: over the whole tensor).
    NaN and infinities must lie where the truth, rounded to that dtype, has them. Where ``plain`` is not
    finite although the truth is, it allows nothing.

    Args:
        actual: what the kernel computed.
        truth64: the same in float64.
        plain: the same by plain PyTorch in ``actual``'s dtype, or ``None`` to allow the floor only
            (where plain PyTorch overflows or cancels, its error is no standard).
        name: opens the message.
        terms: of ``actual``'s shape, what the result is a small difference of: where terms cancel, their
            rounding and not the result's is the least possible error.
        eps: that of ``actual``'s dtype by default.
        tiny: what underflow on the way may cost.

    Returns:
        The largest error as a fraction of what is allowed.

    Raises:
        AssertionError: naming the worst element, both values and its error in % of what is allowed, or the
            first NaN or infinity out of place, or the shapes or dtypes that differ.
    """
    for other, what in ((truth64, "the truth"), (plain, "plain torch")):
        if other is not None and other.shape != actual.shape:
            raise AssertionError(f"{name}: shape {list(actual.shape)}, but {what} has {list(other.shape)}")
    if plain is not None and plain.dtype != actual.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, but plain torch has {plain.dtype}")
    if truth64.dtype != torch.float64:
        raise AssertionError(f"{name}: the truth must be float64, got {truth64.dtype}")
    if actual.numel() == 0:
        return 0.0
    info = torch.finfo(actual.dtype)
    got, truth = actual.detach().double().cpu(), truth64.detach().cpu()
    rounded = truth.to(actual.dtype).double()
    finite = rounded.isfinite()
    strange = (got != rounded) & ~(got.isnan() & rounded.isnan()) & ~(finite & got.isfinite())
    if strange.any():
        at = tuple(strange.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: got {float(got[at])} where the truth is {float(truth[at])}, at {list(at)};"
            f" {int(strange.sum())} of {strange.numel()} NaN or infinities out of place"
        )
    size = _largest(truth, finite, dim)
    if terms is not None:
        size = size.maximum(_largest(terms.detach().double().cpu(), finite, dim))
    allowed = floor * (info.eps if eps is None else eps) * (size + info.smallest_normal) + tiny
    if plain is not None:
        theirs = plain.detach().double().cpu()
        allowed = allowed + factor * _largest(theirs - truth, finite & theirs.isfinite(), dim)
    error = torch.where(finite, (got - truth).abs(), torch.zeros_like(truth))
    fraction = error / allowed
    worst = int(fraction.argmax())
    if fraction.flatten()[worst] > 1:
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        plainly = "" if plain is None else f" (plain torch: {float(plain[at]):.9g})"
        raise AssertionError(
            f"{name}: worst at {list(at)}: got {float(got[at]):.9g}, expected {float(truth[at]):.9g}"
            f"{plainly}, error {float(error[at]):.3g} is {100 * float(fraction[at]):.0f} % of the allowed"
            f" {float(allowed.expand_as(error)[at]):.3g}; {int((fraction > 1).sum())} of"
            f" {error.numel()} elements are beyond"
        )
    return float(fraction.flatten()[worst])


def _largest(values: Tensor, where: Tensor, dim: int | None) -> Tensor:
    """The largest |value| `where` it counts, over each row along `dim`, kept broadcastable."""
    magnitudes = torch.where(where, values.abs(), torch.zeros_like(values))
    if dim is None or magnitudes.dim() == 0:
        return magnitudes.max()
    return magnitudes.amax(dim, keepdim=True)


def value_and_gradients(
    function: Callable[..., Outputs],
    tensors: Sequence[Tensor],
    upstream: Sequence[Tensor | None] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """(outputs, gradients of ``tensors``) of function(*tensors) on fresh leaves, in ``dtype`` if given.

    ``upstream`` are the gradients of the outputs, ones by default; ``None`` in it leaves an output out.
    A tensor that does not require a gradient gets ``None``.
    """
    leaves = [
        t.detach().clone().to(dtype if dtype is not None and t.is_floating_point() else t.dtype)
        for t in tensors
    ]
    for leaf, original in zip(leaves, tensors, strict=True):
        leaf.requires_grad_(original.requires_grad)
    returned = function(*leaves)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    upstream = [torch.ones_like(out) for out in outputs] if upstream is None else upstream
    pairs = [
        (out, g.to(out.dtype).to(out.device))
        for out, g in zip(outputs, upstream, strict=True)
        if g is not None and out.requires_grad
    ]
    if pairs:
        torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
    return tuple(out.detach() for out in outputs), tuple(leaf.grad for leaf in leaves)


def random_like(outputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Gaussian upstream gradients of the outputs' shapes and dtypes: nothing uniform hides behind them."""
    # Not the seed of make_rows: a gradient parallel to its row has no tangent part to judge.
    generator = torch.Generator().manual_seed(seed + 0x5EED)
    return [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).to(out.device)
        for out in outputs
    ]


def _plain(
    function: Callable[..., Outputs],
    tensors: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    truth: tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]],
) -> tuple[tuple[Tensor | None, ...], ...]:
    """Plain PyTorch in the dtype of the tensors. In float64 it would be the truth itself; there its
    float32 error stands in, as much smaller as float64 is finer."""
    if tensors[0].dtype != torch.float64:
        return value_and_gradients(function, tensors, upstream)
    coarse = value_and_gradients(function, tensors, upstream, dtype=torch.float32)
    finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return tuple(
        tuple(
            None if t is None or c is None else t + (c.double() - t) * finer
            for t, c in zip(expected, coarsely, strict=True)
        )
        for expected, coarsely in zip(truth, coarse, strict=True)
    )


def assert_matches_reference(
    kernel: Callable[..., Outputs],
    reference: Callable[..., Outputs],
    tensors: Sequence[Tensor],
    name: str,
    *,
    plain: Callable[..., Outputs] | None = None,
    use_plain: bool = True,
    terms: Callable[..., Outputs] | None = None,
    upstream: Sequence[Tensor | None] | None = None,
    factor: float = 2.0,
    scalar_factor: float | None = None,
    floor: float = 8.0,
    dim: int | None = -1,
    tiny: float = 0.0,
) -> None:
    """Values and gradients of ``kernel(*tensors)`` against ``reference`` in float64, both functions of
    the same tensors; see ``assert_close_to_truth`` for the tolerance.

    Args:
        plain: plain PyTorch at this dtype, the reference itself by default.
        use_plain: ``False`` allows the floor only.
        terms: the reference with what its gradient subtracts left out (a norm held constant, say); its
            gradients are the ``terms`` of the gradients.
        scalar_factor: the factor for single numbers, which plain PyTorch can get right by luck.
        upstream: gradients of the outputs, Gaussian by default.
    """
    outputs, _ = value_and_gradients(kernel, [t.detach() for t in tensors])
    given = random_like(outputs) if upstream is None else upstream
    actual = value_and_gradients(kernel, tensors, given)
    truth = value_and_gradients(reference, tensors, given, dtype=torch.float64)
    eager = _plain(plain or reference, tensors, given, truth) if use_plain else None
    apart = None if terms is None else value_and_gradients(terms, tensors, given, dtype=torch.float64)[1]
    wide = torch.float64 if all(t.dtype == torch.float64 for t in tensors) else torch.float32
    labels = [[f"output {i}" for i in range(len(outputs))], [f"gradient {i}" for i in range(len(tensors))]]
    for part in (0, 1):
        for i, label in enumerate(labels[part]):
            got, expected = actual[part][i], truth[part][i]
            if (got is None) != (expected is None):
                raise AssertionError(f"{name}, {label}: got {got}, expected {expected}")
            if got is None or expected is None:
                continue
            if part == 1 and got.dtype != tensors[i].dtype:
                raise AssertionError(f"{name}, {label}: dtype {got.dtype} of a {tensors[i].dtype} tensor")
            eagerly = None if eager is None else eager[part][i]
            assert_close_to_truth(
                got,
                expected,
                None if eagerly is None else eagerly.to(got.dtype),
                f"{name}, {label}",
                factor=factor if got.dim() or scalar_factor is None else scalar_factor,
                floor=floor,
                dim=dim,
                terms=apart[i] if part == 1 and apart is not None else None,
                eps=max(torch.finfo(got.dtype).eps, torch.finfo(wide).eps),
                tiny=tiny,
            )


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that tensors made in ``call()`` held at one time (CPU memory, by torch's profiler)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
