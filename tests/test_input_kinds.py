"""Every public function and layer, given every kind of tensor: it works as with a plain copy, or a sentence
names the op and the argument. Functions, layers and arguments are found by themselves (input_kinds.py)."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from input_kinds import NUMBERS, REFUSED, SAMPLES, WITHOUT_GRADIENT, WORKING, Wrapper, calls, layers, made
from torch import Tensor
from torch.utils._pytree import tree_leaves

import normface_ext as nf

CALLS = calls()
#: They take any shape, and one tensor.
ANY_SHAPE = {"normalize", "NormalizeLayer"}
every_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.id)
every_number = pytest.mark.parametrize("call", [c for c in CALLS if c.number], ids=lambda call: call.id)


def results(outcome: object) -> list[Tensor]:
    """Without what a subclass or a mode of the input has made of them."""
    bare = [t.held if isinstance(t, Wrapper) else t.as_subclass(Tensor) for t in tree_leaves(outcome)]
    return [torch._from_functional_tensor(t) if torch._is_functional_tensor(t) else t for t in bare]


def plain(value: Tensor) -> Tensor:
    return value.as_subclass(Tensor).clone(memory_format=torch.contiguous_format)


def run(call, given, device):
    """Results; gradients go where they go."""
    made = results(call(given, device))
    # Another number for each, so that no gradient is a constant.
    terms = [(t.double() * (1 + torch.arange(t.numel(), device=t.device).view(t.shape))).sum() for t in made]
    terms = [term for term in terms if term.requires_grad]
    if terms:
        sum(terms).backward()
    return [t.detach() for t in made]


def test_functions_layers_and_their_tensors_are_found():
    found = {call.name for call in CALLS}
    assert found == {*nf.functional.__all__, *layers()}
    assert {"NormFaceLoss", "NormalizeLayer", "SoftTriple", "AdaCos"} <= found
    assert {call.argument for call in CALLS} <= SAMPLES.keys(), "an argument needs a sample"


@every_call
@pytest.mark.covering(1)
def test_kinds_that_work(lane, call):
    """Values and gradients are those of a plain copy, bit by bit. Where memory is aligned otherwise, a BLAS
    may add in another order."""
    for kind, (there_are, make) in WORKING.items():
        rtol, atol = (1e-5, 1e-5) if kind == "an offset into storage" else (0, 0)
        given = call.samples(lane.device)
        leaf = given[call.argument]
        if not there_are(leaf):
            continue
        leaf.requires_grad_(call.takes_gradient)
        value = make(leaf)
        got = run(call, {**given, call.argument: value}, lane.device)
        twin = leaf.detach().clone().requires_grad_(leaf.requires_grad)
        wanted = run(call, {**given, call.argument: plain(make(twin))}, lane.device)
        assert len(got) == len(wanted) > 0, kind
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=kind)
        assert (leaf.grad is None) == (twin.grad is None), kind
        if twin.grad is not None:
            plain_gradient = leaf.grad.as_subclass(Tensor)
            torch.testing.assert_close(plain_gradient, twin.grad, rtol=rtol, atol=atol, msg=kind)


@every_call
@pytest.mark.covering(1)
def test_kinds_that_work_without_a_gradient(lane, call):
    """Not in training: a FunctionalTensor cannot be written to a layer's buffers, nor to BatchNorm's."""
    for kind, (there_are, make) in WITHOUT_GRADIENT.items():
        given = call.samples(lane.device)
        if not there_are(given[call.argument]):
            continue
        with torch.no_grad():
            value = make(given[call.argument])
            got = results(call({**given, call.argument: value}, lane.device, training=False))
            wanted = results(call(given, lane.device, training=False))
        assert len(got) == len(wanted) > 0, kind
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other), kind


@every_call
def test_in_inference_mode(call):
    """All of it, layers as they train: nothing may ask for what such tensors do not have."""
    cpu = torch.device("cpu")
    with torch.no_grad():
        wanted = results(call(call.samples(cpu), cpu))
    with torch.inference_mode():
        got = results(call(call.samples(cpu), cpu))
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@every_number
def test_numbers_of_numpy_are_numbers(call):
    cpu = torch.device("cpu")
    given = call.samples(cpu)
    number = float(given[call.argument])
    wanted = results(call({**given, call.argument: number}, cpu))
    for make in NUMBERS:
        if float(make(number)) != number:  # an integer cannot hold it
            continue
        got = results(call({**given, call.argument: make(number)}, cpu))
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other), make


def refused(call, value, kind: str, given: dict | None = None) -> str:
    cpu = torch.device("cpu")
    with pytest.raises((TypeError, ValueError)) as raised:
        call({**call.samples(cpu), **(given or {}), call.argument: value}, cpu)
    said = str(raised.value)
    assert re.match(rf"[\w.]+: expected `({'|'.join(call.names)})` ", said), f"{kind}: {said}"
    assert "got " in said and len(said) < 400
    return said


@every_call
@pytest.mark.filterwarnings("ignore:The PyTorch API of")
def test_kinds_that_are_refused(call):
    for kind, (there_are, make) in REFUSED.items():
        sample = call.samples(torch.device("cpu"))[call.argument]
        if there_are(sample):
            refused(call, make(sample), kind)


@every_call
def test_the_meta_device_is_one_of_all(call):
    """Beside tensors with values it is refused, and the sentence names both; alone it gives shapes."""
    cpu = torch.device("cpu")
    given = call.samples(cpu)
    given[call.argument] = given[call.argument].to("meta")
    if call.name in ANY_SHAPE:
        assert all(t.is_meta for t in results(call(given, cpu)))
        return
    with pytest.raises((TypeError, ValueError), match=rf"^\w+: .*`({'|'.join(call.names)})`.*meta"):
        call(given, cpu)


@every_call
def test_one_dimension_more_is_refused(call):
    sample = call.samples(torch.device("cpu"))[call.argument]
    if call.name not in ANY_SHAPE:
        refused(call, sample[None].expand(2, *sample.shape), "of one dimension more")


@pytest.mark.skipif(not hasattr(Tensor, "has_names"), reason="named tensors went with torch 2.13")
def test_named_tensors_are_refused():
    for call in CALLS:
        sample = call.samples(torch.device("cpu"))[call.argument]
        if sample.dim():
            refused(call, sample.rename(*"abcd"[: sample.dim()]), "named")


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@every_call
def test_a_dtensor_is_refused_and_told_what_to_do(call, mesh):
    """What lies here would be read as if it were the whole."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    sample = call.samples(torch.device("cpu"))[call.argument]
    said = refused(call, distribute_tensor(sample, mesh, [Replicate()]), "DTensor")
    assert all(way in said for way in (".to_local()", ".full_tensor()", "shard_head")), said


@pytest.mark.parametrize("layer", [nf.NormFaceLoss, nf.CContrastiveLoss, nf.CTripletLoss, nf.SphereFace2Loss])
@pytest.mark.filterwarnings("ignore:The PyTorch API of")
def test_a_class_parallel_head_refuses_the_same(layer, mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    head = nf.distributed.shard_head(made(layer), mesh)
    foreign = {"DTensor": (lambda t: True, lambda t: distribute_tensor(t, mesh, [Replicate()]))}
    for call in (call for call in CALLS if call.name == layer.__name__):
        sharded = replace(call, make=lambda beside, device: head)
        sharded(call.samples(torch.device("cpu")), torch.device("cpu"))
        for kind, (there_are, make) in {**REFUSED, **foreign}.items():
            sample = SAMPLES[call.argument]()
            if there_are(sample):
                refused(sharded, make(sample), kind)


@pytest.mark.parametrize(
    "call", [c for c in CALLS if c.name in nf.functional.__all__], ids=lambda call: call.id
)
def test_memory_that_is_gone_is_no_crash(lane, call):
    """As FSDP leaves a weight between two forward passes. torch's own ops may crash there, and so recipes."""
    if lane.device.type != "cpu":
        pytest.skip("a device's memory can be read past its end without a word")
    for make in (lambda t: t.clone(), lambda t: torch.cat([t, t])[len(t) :]):
        given = call.samples(lane.device)
        if given[call.argument].dim() == 2:
            given[call.argument] = make(given[call.argument])
            given[call.argument].untyped_storage().resize_(0)
            with pytest.raises(
                RuntimeError, match=r"^\w+: expected `\w+` to have values, got a tensor without"
            ):
                call(given, lane.device)
