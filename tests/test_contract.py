"""What holds for every op: kernels, fakes and references exist, and bad input is answered by a sentence.

The list of ops is csrc/schemas.h; an op added there without the rest fails here.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import touched
from lanes import LANES

import normface_ext as nf
from normface_ext import reference
from normface_ext.engine import calls, library, native, updates
from normface_ext.functional import norm_linear, normalize, normface_loss

HERE = Path(__file__).resolve().parent
NAMES = sorted(touched.ops())


#: Ops whose samples need more than a row of arguments: the file that has them and opchecks the op.
CHECKED_ELSEWHERE = {
    "inner_distance": "test_inner_distance.py",
    "inner_distance_backward": "test_inner_distance.py",
    "pair_distance": "test_inner_distance.py",
    "pair_distance_backward": "test_inner_distance.py",
    "target_cosine": "test_metric_losses.py",
    "target_center": "test_sub_centers.py",
    "hinge_threshold": "test_metric_losses.py",
    "hinge_slopes": "test_metric_losses.py",
    "hinge_pairs": "test_metric_losses.py",
    "cosine_pairs_backward": "test_metric_losses.py",
}
#: Ops that are a step of another one, which has the function, the reference and the gradient.
STEPS = {
    "target_cosine": "head_sweep",
    "target_center": "head_sweep",
    "head_backward_update": "head_sweep",
    **dict.fromkeys(("hinge_threshold", "hinge_slopes", "hinge_pairs"), "cosine_pairs"),
}
#: Ops that users reach under other names.
FUNCTIONS = {
    "cosine_pairs": "c_contrastive_loss",
    "pair_distance": "triplet_loss",
    **dict.fromkeys(("head_sweep", "head_shift", "softmax_finish", "softmax_loss"), "normface_loss"),
}


def sentence(text):
    """A pattern that matches `text` and nothing around it."""
    return f"^{re.escape(text)}$"


# Every op exists everywhere -------------------------------------------------------------------------


def has_kernel(name, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def test_the_list_of_ops_is_read():
    assert len(NAMES) == len(set(NAMES)) >= 6
    assert {"normalize", "norm_linear", "head_sweep"} <= set(NAMES)
    registered = [
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("normface_ext::")
    ]
    assert sorted(registered) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_kernels_a_fake_and_a_sample(lane, name):
    key = "CUDA" if lane.device.type == "cuda" else "CPU"
    assert has_kernel(f"{lane.namespace}::{name}", key)
    assert name in calls.FAKES
    if name in CHECKED_ELSEWHERE:
        source = Path(__file__).with_name(CHECKED_ELSEWHERE[name]).read_text()
        assert f"namespace.{name}.default" in source or f"op.{name}.default" in source
        return
    real = arguments(lane, name, next(iter(SAMPLES[name](lane))))
    # The fake answers without touching data.
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        faked = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
            if isinstance(a, torch.Tensor)
            else a
            for a in real
        ]
        getattr(kernels(lane), name)(*faked)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_backward")])
def test_every_op_has_a_function_and_a_reference(name):
    name = STEPS.get(name, name)
    public = FUNCTIONS.get(name, name)
    assert callable(getattr(nf.functional, public)) and callable(getattr(reference, public))
    assert ("head_backward" if public == "normface_loss" else f"{name}_backward") in NAMES
    assert getattr(nf.functional, public).__doc__, "a public function says shapes, dtypes and formula"


def test_public_names_are_those_of_the_design():
    names = ["NormalizeLayer", "NormLinear", "NormFaceLoss", "CosFace", "ArcFace", "CombinedMargin"]
    names += ["functional", "reference", "theory", "build_info", "plan"]
    assert set(names) <= set(nf.__all__)
    for name in nf.__all__:
        assert getattr(nf, name).__doc__


# Samples of every op for opcheck: real arguments, options that change shapes, empty results.


def normalize_samples(lane):
    yield {"x": lane.randn(3, 5)}
    yield {"x": lane.randn(2, 5, 3, 4).to(memory_format=torch.channels_last), "p": 1}
    yield {"x": lane.randn(2, 5, 3, dtype=torch.bfloat16), "dim": 0}
    yield {"x": lane.randn(0, 5, dtype=torch.float64), "eps": 0.5}


def normalize_backward_samples(lane):
    for given in normalize_samples(lane):
        given["norm"] = kernels(lane).normalize(*arguments(lane, "normalize", given))[1]
        grad_y, grad_norm = torch.ones_like(given["x"]), torch.ones_like(given["norm"])
        yield {**given, "grad_y": grad_y, "grad_norm": grad_norm}
        yield {**given, "grad_y": None, "grad_norm": grad_norm}
        yield {**given, "grad_y": grad_y, "grad_norm": None}


def norm_linear_samples(lane):
    x, weight = lane.randn(3, 5), lane.randn(4, 5)
    yield {"x": x, "weight": weight}
    yield {"x": x.bfloat16(), "weight": weight, "scale": lane.tensor(3.0), "normalize_input": False}
    yield {"x": x.double()[:0], "weight": weight.double(), "eps": 0.5}


def norm_linear_backward_samples(lane):
    for i, given in enumerate(norm_linear_samples(lane)):
        given["grad"] = lane.randn(given["x"].shape[0], 4, dtype=given["x"].dtype)
        yield given
        yield {**given, "need_x": i == 0, "need_weight": i == 1, "need_scale": i == 2}


THIS_CPU = (False, torch.get_num_threads(), 0, 0, 0, "")
#: By whether E is kept: what is enough; and for four classes at a time of eight, on a CPU.
HALF_OF_THEM = {True: 1 << 30, False: native.workspace_bytes("blas", native.Step(3, 5, 8, 4), THIS_CPU, 4)}


def head_sweep_samples(lane):
    # 8 classes: CUDA kernels pad the stored E to a multiple of that, with whatever lay there.
    x, weight, labels = lane.randn(3, 5), lane.randn(8, 5), lane.tensor([0, 7, -100])
    given = {"x": x, "weight": weight, "labels": labels, "m3_value": 0.1}
    for reduction in (0, 1, 2):
        for store in (False, True):
            yield {**given, "reduction": reduction, "store": store, "workspace": HALF_OF_THEM[store]}
    yield {**given, "scale": lane.tensor(200.0), "need_x": False}
    double = {"x": x.double(), "weight": weight.double(), "product_precision": torch.float64}
    yield {**given, **double, "reduction": 0, "store": True}
    yield {**given, "x": x.bfloat16(), "product_precision": torch.bfloat16, "store": True}
    smooth = {"smoothing": 0.1, "need_class_sum": True}
    yield {**given, **smooth, "class_weight": lane.randn(8).abs(), "reduction": 0}
    yield {**given, "sample_weight": lane.randn(3).abs()}
    shard = {"is_shard": True, "total_classes": 20, "labels": lane.tensor([0, -1, -100])}
    yield {**given, **shard, "x": x.bfloat16(), "shift": lane.tensor([3.0, 2.0, 0.0], torch.float64)}
    yield {**given, **shard, **smooth, "weight": weight[:0], "labels": lane.tensor([-1, -1, -100])}
    yield {**given, "scale": lane.tensor([200.0, 8.0, 30.0]), "m2": lane.tensor([0.1, 0.5, 3.0]), "guard": 2}
    yield {**given, "m1": lane.tensor(0.9, torch.float64), "need_margin": True, "straight": True}
    threshold = lane.tensor([1.5, 0.5, 2.0], torch.float64)
    numbers = lane.tensor([1.0, 0.3, 0.0, 2.0, 0.3, 1.0], torch.float64)
    yield {**given, "term": 1, "threshold": threshold / 10, "numbers": numbers, "highest": 2.0}
    yield {**given, "term": 2, "threshold": threshold, "need_x": False, "sink": 1, "capacity": 3}
    yield {**given, "term": 3, "threshold": threshold, "store": True, "need_x": False}
    yield {**given, "term": 2, "threshold": threshold, "need_x": False, "sink": 2, "capacity": 1}
    yield {**given, "need_largest": True}


def head_shift_samples(lane):
    return head_sweep_samples(lane)


def with_results(lane, name, given):
    """The arguments and, under the names that the next stage has for them, the results of an op."""
    op = getattr(kernels(lane), name)
    names = [result.name for result in op.default._schema.returns]
    return {**given, **dict(zip(names, op(*arguments(lane, name, given)), strict=True))}


def softmax_finish_samples(lane):
    for given in head_sweep_samples(lane):
        yield with_results(lane, "head_sweep", given)


def head_backward_samples(lane):
    for given in softmax_finish_samples(lane):
        given = with_results(lane, "softmax_finish", given)
        given["grad_loss"] = torch.ones_like(given["loss"])
        yield {**given, "need_x": True}  # an x_sum that the sweep did not make is made here
        yield {**given, "need_x": False, "need_weight": False}


def head_backward_update_samples(lane):
    """The rules take turns: what one does with rows is the same whatever made them."""
    for i, given in enumerate(itertools.islice(head_backward_samples(lane), 0, None, 2)):
        one, two = (torch.ones_like(given["weight"]) for _ in range(2))
        yield (
            given
            | [
                {"update": updates.RULES["sgd"], "momentum": 0.9, "state1": one},
                {"update": updates.RULES["sgd"]},
                {
                    "update": updates.RULES["adam"],
                    "beta2": 0.9,
                    "decoupled": True,
                    "state1": one,
                    "state2": two,
                },
                {"update": updates.RULES["add"], "state1": one},
            ][i % 4]
        )


def softmax_loss_samples(lane):
    """Of sizes that leave no gap between the parts of `saved`: what lies in one is another in every run."""
    x, weight, labels = lane.randn(16, 6), lane.randn(32, 6), lane.labels(16, 32)
    given = {"x": x, "weight": weight, "labels": labels, "total_classes": 32, "m3_value": 0.1, "keep_x": True}
    for reduction in (0, 1, 2):
        yield {**given, "reduction": reduction, "keep_x": reduction > 0}
    yield {**given, "scale": lane.randn(16).abs() * 30, "sample_weight": lane.randn(16).abs()}
    double = {"x": x.double(), "weight": weight.double(), "product_precision": torch.float64}
    yield {**given, **double, "class_weight": lane.randn(32).abs().double()}
    yield {**given, "x": x.bfloat16(), "need_largest": True}
    yield {**given, "m1": lane.tensor(0.9, torch.float64), "need_margin": True, "straight": True}
    numbers = lane.tensor([1.0, 0.3, 0.0, 2.0, 0.3, 1.0], torch.float64)
    threshold = lane.randn(16, dtype=torch.float64)
    yield {**given, "term": 1, "threshold": threshold, "numbers": numbers, "highest": 2.0}


def softmax_loss_backward_samples(lane):
    for given in softmax_loss_samples(lane):
        given = with_results(lane, "softmax_loss", given)
        given["grad_loss"] = torch.ones_like(given["loss"])
        yield {**given, "need_x": True}
        yield {**given, "need_x": False, "need_weight": False}


#: What a sample does not say.
DEFAULTS = {
    "dim": 1, "p": 2, "eps": 1e-12, "normalize_input": True, "scale": None,
    "scale_value": 30.0, "m1": None, "m2": None, "m3": None, "m1_value": 1.0, "m2_value": 0.0,
    "m3_value": 0.0, "need_margin": False, "formula": 0, "guard": 0, "straight": False, "reduction": 1,
    "ignore_index": -100, "workspace": 1 << 30, "product": "auto", "threshold": None, "numbers": None,
    "term": 0, "lowest": -1.0, "highest": 1.0, "centers": 1, "sink": 0, "capacity": 0,
    "store": False, "keep_x": False, "need_class_sum": False, "need_largest": False, "total_classes": 8,
    "is_shard": False, "shift": None,
    "need_x": True, "need_weight": True, "need_scale": True,
    "product_precision": torch.float32,
    "sample_weight": None, "class_weight": None, "smoothing": 0.0,
    "state1": None, "state2": None, **updates.Numbers(lr=0.1)._asdict(),
}  # fmt: skip


def arguments(lane, name, given):
    """The arguments of an op in the order of its schema."""
    schema = getattr(kernels(lane), name).default._schema
    return [given[a.name] if a.name in given else DEFAULTS[a.name] for a in schema.arguments]


SAMPLES = {
    "normalize": normalize_samples,
    "normalize_backward": normalize_backward_samples,
    "norm_linear": norm_linear_samples,
    "norm_linear_backward": norm_linear_backward_samples,
    "head_sweep": head_sweep_samples,
    "head_shift": head_shift_samples,
    "softmax_finish": softmax_finish_samples,
    "head_backward": head_backward_samples,
    "head_backward_update": head_backward_update_samples,
    "softmax_loss": softmax_loss_samples,
    "softmax_loss_backward": softmax_loss_backward_samples,
}


def kernels(lane):
    return getattr(torch.ops, lane.namespace)


def opcheck(lane, name, given):
    """Schema (nothing is modified, nothing aliased), fake kernel, tracing with dynamic shapes."""
    torch.library.opcheck(getattr(kernels(lane), name).default, tuple(arguments(lane, name, given)))


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(lane, name):
    opcheck(lane, name, next(iter(SAMPLES[name](lane))))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_of_every_sample(lane, name):
    for given in SAMPLES[name](lane):
        opcheck(lane, name, given)


def test_fakes_know_the_padding_of_odd_class_counts(lane):
    for given in head_sweep_samples(lane):
        if given.get("is_shard"):
            continue
        given["weight"], given["labels"] = given["weight"][:5].contiguous(), lane.tensor([0, 4, -100])
        if "class_weight" in given:
            given["class_weight"] = given["class_weight"][:5].contiguous()
        op = kernels(lane).head_sweep.default
        given_arguments = tuple(arguments(lane, "head_sweep", given))
        torch.library.opcheck(op, given_arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_fake_of_softmax_loss_knows_the_gaps_between_the_parts(lane):
    """All but tracing, which compares whatever lies in them."""
    for given in head_sweep_samples(lane):
        if "shift" in given or given.get("term", 0) > 1 or given.get("is_shard"):
            continue
        given |= {"keep_x": given.get("need_x", True), "need_margin": "m1" in given}
        given_arguments = tuple(arguments(lane, "softmax_loss", given))
        op = kernels(lane).softmax_loss.default
        torch.library.opcheck(op, given_arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("smoothing, need_class_sum", [(0.1, False), (0.0, True)])
def test_softmax_loss_wants_the_class_sum_with_smoothing_alone(lane, smoothing, need_class_sum):
    given = next(softmax_loss_samples(lane)) | {"smoothing": smoothing, "need_class_sum": need_class_sum}
    with pytest.raises(RuntimeError, match="softmax_loss: expected `need_class_sum` with `smoothing`"):
        kernels(lane).softmax_loss(*arguments(lane, "softmax_loss", given))


# Sentences ------------------------------------------------------------------------------------------


def good(**changed):
    torch.manual_seed(0)
    return {
        "x": torch.randn(3, 4),
        "weight": torch.randn(5, 4),
        "labels": torch.tensor([0, 4, 2]),
        "scale": 8.0,
        **changed,
    }


def loss(**changed):
    return normface_loss(**good(**changed))


def linear(**changed):
    given = good(**changed)
    del given["labels"]
    return norm_linear(**given)


X, W = torch.zeros(3, 4), torch.zeros(5, 4)
DTYPES = "float64, float32, float16 or bfloat16"

HEAD_ERRORS = [
    ({"x": [1.0]}, TypeError, "expected `x` to be a Tensor, got list"),
    ({"x": np.zeros((3, 4))}, TypeError, "expected `x` to be a Tensor, got ndarray"),
    ({"x": None}, TypeError, "expected `x` to be a Tensor, got NoneType"),
    ({"x": X.int()}, TypeError, f"expected `x` to be {DTYPES}, got torch.int32"),
    ({"x": X.bool()}, TypeError, f"expected `x` to be {DTYPES}, got torch.bool"),
    ({"x": X.cfloat()}, TypeError, f"expected `x` to be {DTYPES}, got torch.complex64"),
    ({"weight": W.long()}, TypeError, f"expected `weight` to be {DTYPES}, got torch.int64"),
    ({"x": X[0]}, ValueError, "expected `x` to be 2-D [N, D], got shape [4]"),
    ({"x": X[None]}, ValueError, "expected `x` to be 2-D [N, D], got shape [1, 3, 4]"),
    ({"weight": W[0]}, ValueError, "expected `weight` to be 2-D [C, D], got shape [4]"),
    (
        {"weight": W[:, :3]},
        ValueError,
        "expected `weight` to be [C, 4] to match `x`, got shape [5, 3]",
    ),
    ({"weight": W[:0]}, ValueError, "expected `weight` to have at least one class, got shape [0, D]"),
    (
        {"x": X.double()},
        TypeError,
        "expected `weight` and `x` to be both float64 or both not, got torch.float32 and torch.float64",
    ),
    (
        {"weight": W.double()},
        TypeError,
        "expected `weight` and `x` to be both float64 or both not, got torch.float64 and torch.float32",
    ),
    ({"weight": W.to("meta")}, ValueError, "expected `weight` on the device of `x` (cpu), got meta"),
    ({"scale": "8"}, TypeError, "expected `scale` to be a float or a tensor of one element, got str"),
    ({"scale": None}, TypeError, "expected `scale` to be a float or a tensor of one element, got NoneType"),
    ({"scale": True}, TypeError, "expected `scale` to be a float or a tensor of one element, got bool"),
    ({"scale": float("nan")}, ValueError, "expected `scale` to be finite, got nan"),
    ({"scale": float("inf")}, ValueError, "expected `scale` to be finite, got inf"),
    (
        {"scale": torch.ones(2)},
        ValueError,
        "expected `scale` to be a float or a floating tensor of one element{rows}, got torch.float32 of"
        " shape [2]",
    ),
    (
        {"scale": torch.tensor(8)},
        ValueError,
        "expected `scale` to be a float or a floating tensor of one element{rows}, got torch.int64 of"
        " shape []",
    ),
    (
        {"scale": torch.tensor(8.0, device="meta")},
        ValueError,
        "expected `scale` on the device of `x` (cpu), got meta",
    ),
    ({"eps": -1e-12}, ValueError, "expected `eps` to be finite and >= 0, got -1e-12"),
    ({"eps": float("nan")}, ValueError, "expected `eps` to be finite and >= 0, got nan"),
    ({"eps": "0"}, TypeError, "expected `eps` to be a number, got str"),
    ({"eps": False}, TypeError, "expected `eps` to be a number, got bool"),
]

LABEL = "expected `labels` in [0, 5) or ignore_index (-100), got"
LOSS_ERRORS = [
    ({"labels": [0, 1, 2]}, TypeError, "expected `labels` to be a Tensor, got list"),
    ({"labels": torch.zeros(3)}, TypeError, "expected `labels` to be int64 or int32, got torch.float32"),
    (
        {"labels": torch.zeros(3).short()},
        TypeError,
        "expected `labels` to be int64 or int32, got torch.int16",
    ),
    ({"labels": torch.tensor([0, 1])}, ValueError, "expected `labels` to have shape [3], got [2]"),
    (
        {"labels": torch.zeros(3, 5).long()},
        ValueError,
        "expected `labels` to have shape [3], got [3, 5]",
    ),
    (
        {"labels": torch.zeros(3).long().to("meta")},
        ValueError,
        "expected `labels` on the device of `x` (cpu), got meta",
    ),
    ({"labels": torch.tensor([0, 5, 9])}, IndexError, f"{LABEL} 5 at row 1"),
    ({"labels": torch.tensor([0, 1, -1])}, IndexError, f"{LABEL} -1 at row 2"),
    ({"labels": torch.tensor([2**40, -100, 0])}, IndexError, f"{LABEL} {2**40} at row 0"),
    (
        {"labels": torch.tensor([-100, 1, 2]), "ignore_index": -1},
        IndexError,
        "expected `labels` in [0, 5) or ignore_index (-1), got -100 at row 0",
    ),
    *(
        (
            {"reduction": wrong},
            ValueError,
            f"expected `reduction` to be one of none, mean, sum, batchmean, got {wrong!r}",
        )
        for wrong in ("avg", None)
    ),
    (
        {"margin": 0.5},
        TypeError,
        "expected `margin` to be CosFace, ArcFace, CombinedMargin, RowMargin, a BatchMargin or None,"
        " got float",
    ),
]

NORMALIZE_ERRORS = [
    (([1.0, 2.0],), TypeError, "expected `x` to be a Tensor, got list"),
    ((X.int(),), TypeError, f"expected `x` to be {DTYPES}, got torch.int32"),
    ((torch.tensor(1.0), 0), ValueError, "expected `x` to have at least one dimension, got a 0-d tensor"),
    ((X, 2), IndexError, "expected `dim` in [-2, 2), got 2"),
    ((X, -3), IndexError, "expected `dim` in [-2, 2), got -3"),
    ((torch.zeros(3),), IndexError, "expected `dim` in [-1, 1), got 1"),
    ((X, 1, 3), ValueError, "expected `p` to be 1 or 2, got 3"),
    ((X, 1, 0), ValueError, "expected `p` to be 1 or 2, got 0"),
    ((X, 1, "2"), ValueError, "expected `p` to be 1 or 2, got '2'"),
    ((X, 1, 2, -1.0), ValueError, "expected `eps` to be finite and >= 0, got -1.0"),
    ((X, 1, 2, None), TypeError, "expected `eps` to be a number, got NoneType"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), NORMALIZE_ERRORS)
def test_errors_of_normalize(arguments, error, text):
    with pytest.raises(error, match=sentence(f"normalize: {text}")):
        normalize(*arguments)


@pytest.mark.parametrize("op", [linear, loss])
@pytest.mark.parametrize(("changed", "error", "text"), HEAD_ERRORS)
def test_errors_of_the_heads(op, changed, error, text):
    name, rows = {linear: ("norm_linear", ""), loss: ("normface_loss", " or of shape [3]")}[op]
    op()  # fine before the change
    with pytest.raises(error, match=sentence(f"{name}: {text.replace('{rows}', rows)}")):
        op(**changed)


@pytest.mark.parametrize(("changed", "error", "text"), LOSS_ERRORS)
def test_errors_of_the_loss(changed, error, text):
    with pytest.raises(error, match=sentence(f"normface_loss: {text}")):
        loss(**changed)


def test_a_refused_call_leaves_its_inputs_alone():
    given = good(labels=torch.tensor([0, 7, 2]))
    before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(IndexError):
        normface_loss(**given)
    for name, value in before.items():
        assert torch.equal(given[name], value) and given[name]._version == 0


def test_a_cuda_tensor_without_cuda_kernels_gets_the_reason(monkeypatch):
    """The kernels of the wrong device must not be reached; tensors here are fakes on a fake GPU."""
    monkeypatch.setattr(library, "_cuda_reason", "`_cuda` was not built (a reason)")
    with torch._subclasses.fake_tensor.FakeTensorMode():
        x, weight = (torch.empty(shape, device="cuda") for shape in ((3, 4), (5, 4)))
        labels = torch.empty(3, dtype=torch.int64, device="cuda")
        calls = [lambda: normalize(x), lambda: norm_linear(x, weight)]
        calls.append(lambda: normface_loss(x, weight, labels, 8.0))
        for call in calls:
            with pytest.raises(
                RuntimeError,
                match=r"^\w+: expected the CUDA kernels to be loaded, got a CUDA tensor .*`_cuda` was not"
                r" built \(a reason\).*NORMFACE_CUDA=1 pip install",
            ):
                call()


# The second line: ops called past the door ----------------------------------------------------------


HEADS = ("norm_linear", "head_sweep")


@pytest.mark.parametrize(
    ("names", "change", "text"),
    [
        (["normalize"], {"x": X.int()}, r"expected `x` to be float64, float32"),
        (["normalize"], {"dim": 2}, r"expected `dim` in \[0, 2\), got 2"),
        (["normalize"], {"p": 3}, r"expected `p` to be 1 or 2, got 3"),
        (HEADS, {"x": X[0]}, r"expected `x` to be 2-D and contiguous, got shape \[4\]"),
        (HEADS, {"weight": torch.zeros(5, 4).t()}, r"expected `weight` to be 2-D and contiguous"),
        (HEADS, {"weight": torch.zeros(0, 5)}, r"expected `weight` to have at least one class"),
        (HEADS, {"weight": torch.zeros(5, 3)}, r"expected `weight` to be \[C, 5\], got \[5, 3\]"),
        (HEADS, {"weight": torch.zeros(5, 5).double()}, r"expected .* both float64 or both not"),
        (HEADS[1:], {"labels": torch.zeros(3).int()}, r"expected `labels` to be contiguous int64"),
        (HEADS[1:], {"labels": torch.zeros(2).long()}, r"expected `labels` .* of shape \[3\]"),
    ],
)
def test_ops_check_again(lane, names, change, text):
    for name in names:
        given = {**next(iter(SAMPLES[name](lane))), **change}
        given = {k: v.to(lane.device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        with pytest.raises(RuntimeError, match=f"^{name}: {text}"):
            getattr(kernels(lane), name)(*arguments(lane, name, given))


ABORTS = """
import sys
from lanes import LANES
from test_contract import arguments, kernels
lane = next(lane for lane in LANES if lane.name == sys.argv[1])
with lane.active():
    given = {"x": lane.randn(3, 4), "weight": lane.randn(5, 4), "labels": lane.tensor([0, 7, 2])}
    print(float(kernels(lane).head_sweep(*arguments(lane, "head_sweep", given))[0].sum()))
"""


def test_kernels_refuse_a_label_out_of_range_by_name(lane):
    """Where nothing stood before them; on a GPU this ends the process, as torch's own cross_entropy does."""
    command = [sys.executable, "-c", ABORTS, lane.name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent / "scripts")))}
    ran = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    assert ran.returncode != 0, ran.stdout
    said = ran.stdout + ran.stderr
    assert "labels" in said and "7" in said and "row 1" in said, said[-2000:]


def test_every_lane_of_this_machine_is_tested():
    names = [lane.name for lane in LANES]
    assert len(names) == len(set(names)) >= 1
    if torch.cuda.is_available() and nf.build_info()["cuda_loaded"] and "cpu" in names:
        assert "cuda" in names
