"""What torch does to modules, done to every public layer and margin: modes, defaults, copies, deferred
initialisation, parametrizations, averages, clipping and loss scaling."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import contextmanager

import pytest
import torch
from input_kinds import C, D, forward_samples, layers, made, margins
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import normface_ext as nf

LAYERS, MARGINS = layers(), margins()
WEIGHTED = {name: layer for name, layer in LAYERS.items() if hasattr(made(layer), "weight")}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
every_weighted = pytest.mark.parametrize("layer", WEIGHTED.values(), ids=WEIGHTED)
every_margin = pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)


def converted(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.to(dtype).requires_grad_() if t.is_floating_point() else t for n, t in given.items()}


def stepped(module: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """The result, and the gradients of the input and the parameters."""
    result = module(**given)
    result.float().sum().backward()
    leaves = [*given.values(), *module.parameters()]
    return [result.detach(), *(t.grad for t in leaves if t.grad is not None)]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def uninitialised_is_nan():
    """Deterministic mode, in which torch fills memory that nobody has written with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def test_layers_and_margins_are_found():
    assert {"NormFaceLoss", "NormLinear", "SphereFace2Loss", "AdaCos", "UniFace"} <= WEIGHTED.keys()
    assert {"AdaFace", "CurricularFace", "KappaFace", "MVSoftmax"} <= MARGINS.keys()


# Defaults and modes ---------------------------------------------------------------------------------


@every_layer
def test_default_dtype_float64(layer):
    """Made under it a layer is float64; one that was made before computes what it did."""
    given = forward_samples(layer)
    with torch.no_grad():
        before = made(layer)(**given)
        earlier = made(layer)
        with default_dtype(torch.float64):
            assert torch.equal(earlier(**given), before)
            wide = made(layer)
            assert all(p.dtype == torch.float64 for p in wide.parameters())
            result = wide(**converted(given, torch.float64))
    assert result.dtype == torch.float64 and result.isfinite().all()


@every_layer
def test_float16_on_the_cpu(layer):
    got = stepped(made(layer).half(), converted(forward_samples(layer), torch.float16))
    assert len(got) > 1 and all(t.isfinite().all() for t in got)


@every_layer
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_device(layer, device):
    """A layer made under a default device is there, and one that lies elsewhere works on as it did."""
    given = forward_samples(layer)
    wanted = stepped(made(layer), converted(given, torch.float32))
    earlier, inputs = made(layer), converted(given, torch.float32)
    with torch.device(device):
        for one, other in zip(stepped(earlier, inputs), wanted, strict=True):
            assert torch.equal(one, other)
        there = made(layer)
    assert all(t.device.type == device for t in there.parameters())
    result = there(**{name: t.to(device) for name, t in given.items()})
    assert result.device.type == device and result.shape == wanted[0].shape


@every_layer
def test_deterministic_mode(layer):
    """Nothing refuses to run, and nothing reads what nobody has written."""
    given = converted(forward_samples(layer), torch.float32)
    wanted = stepped(made(layer), converted(forward_samples(layer), torch.float32))
    with uninitialised_is_nan():
        got = stepped(made(layer), given)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


# Deferred initialisation ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*LAYERS.values(), *MARGINS.values()], ids=[*LAYERS, *MARGINS])
def test_deferred_initialisation(kind):
    """Made on meta, materialised, reset: every parameter and buffer has the values that a new one has."""
    with torch.device("meta"):
        module = made(kind)
    with uninitialised_is_nan():
        module.to_empty(device="cpu")
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    state, new = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (module, made(kind)))
    assert state.keys() == new.keys()
    for name, value in state.items():
        if name == "weight":
            torch.testing.assert_close(value.norm(dim=1), torch.ones(len(value)))
        else:
            assert torch.equal(value, new[name]), name
    if kind in LAYERS.values():
        assert module(**forward_samples(kind)).isfinite().all()


# Copies ---------------------------------------------------------------------------------------------


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("trip", [copy.copy, copy.deepcopy, pickled, saved])
@every_layer
def test_a_copy_computes_the_same(layer, trip):
    """Of a layer that has run, and its state_dict loads with weights_only."""
    given = forward_samples(layer)
    module = made(layer)
    module(**given)
    twin = trip(module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    third = made(layer)
    third.load_state_dict(torch.load(file, weights_only=True))
    module.eval(), twin.eval(), third.eval()
    wanted = module(**given)
    assert torch.equal(twin(**given), wanted) and torch.equal(third(**given), wanted)


@pytest.mark.parametrize("trip", [copy.deepcopy, pickled, saved])
@every_margin
def test_a_margin_is_copied(margin, trip):
    first = made(margin)
    twin = trip(first)
    assert repr(twin) == repr(first) and twin.state_dict().keys() == first.state_dict().keys()
    x, labels = torch.randn(4, D), torch.tensor([0, 1, 2, 3])
    rows = [
        torch.manual_seed(3) and nf.NormFaceLoss(D, C, scale=16.0, margin=m)(x, labels).detach()
        for m in (first, twin)
    ]
    assert torch.equal(*rows)


def test_margins_of_numbers_load_with_weights_only():
    """As hyper-parameters in a checkpoint do."""
    kept = [
        nf.CosFace(0.2),
        nf.ArcFace(0.4, guard="none"),
        nf.CombinedMargin(0.9, 0.4, 0.1),
        nf.RowMargin(m2=0.1),
    ]
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == kept


# Parametrizations -----------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


class Halved(nn.Module):
    """Without a way back."""

    def forward(self, weight):
        return weight / 2


WAYS = {
    "doubled": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "weight"),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer, "weight"),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, "weight"),
    "weight_norm by hooks": lambda layer: nn.utils.weight_norm(layer, "weight"),
    "spectral_norm by hooks": lambda layer: nn.utils.spectral_norm(layer, "weight"),
    "pruned by hooks": lambda layer: prune.l1_unstructured(layer, "weight", 0.2),
}
SETTABLE = ("doubled", "weight_norm")


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("way", WAYS)
@every_weighted
def test_a_parametrized_weight_is_trained(layer, way):
    """And the result is that of its present value."""
    module, plain = WAYS[way](made(layer)).eval(), made(layer).eval()
    given = converted(forward_samples(layer), torch.float32)
    result = module(**given)
    with torch.no_grad():
        plain.weight.copy_(module.weight)
    assert torch.equal(result, plain(**given))
    module.train()
    assert all(t.isfinite().all() for t in stepped(module, given))
    assert all(p.grad is not None for p in module.parameters())


def raw(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items() if "extra" not in name}


@pytest.mark.parametrize("way", SETTABLE)
@every_weighted
def test_a_parametrized_weight_is_set(layer, way):
    """renormalize_ and reset_parameters set what it is made of: a change of the weight would be lost."""
    module = WAYS[way](made(layer))
    with torch.no_grad():
        for parameter in module.parametrizations["weight"].parameters():
            parameter.mul_(3)
    before = module.weight.detach().clone()
    module.renormalize_()
    torch.testing.assert_close(module.weight.norm(dim=1), torch.ones(len(module.weight)))
    torch.testing.assert_close(module.weight, nf.functional.normalize(before))
    unit = module.weight.detach().clone()
    module.reset_parameters()
    torch.testing.assert_close(module.weight.norm(dim=1), torch.ones(len(unit)))
    assert not torch.isclose(module.weight, unit).all(dim=1).any()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(
    "way",
    ["spectral_norm", "weight_norm by hooks", "spectral_norm by hooks", "pruned by hooks", "no way back"],
)
@every_weighted
def test_a_weight_that_cannot_have_unit_rows_says_so(layer, way):
    """And nothing has changed then."""
    module = made(layer)
    if way == "no way back":
        parametrize.register_parametrization(module, "weight", Halved())
    else:
        WAYS[way](module)
    module.eval()
    state = raw(module)
    with pytest.raises(ValueError, match=r"^\w+: expected .*`weight`"):
        module.renormalize_()
    assert all(torch.equal(value, state[name]) for name, value in raw(module).items())
    if way == "spectral_norm":  # directions are what counts
        module.reset_parameters()
        assert not torch.equal(
            raw(module)["parametrizations.weight.original"], state["parametrizations.weight.original"]
        )
    else:
        with pytest.raises(ValueError, match=r"^\w+: expected .*`weight`"):
            module.reset_parameters()


# Averages, clipping, loss scaling -------------------------------------------------------------------


@every_weighted
@pytest.mark.parametrize("buffers", [False, True])
def test_an_exponential_average(layer, buffers):
    module, given = made(layer), forward_samples(layer)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=buffers)
    average.update_parameters(module)
    first = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    average.update_parameters(module)
    for mean, start in zip(average.module.parameters(), first, strict=True):
        torch.testing.assert_close(mean, start + 0.25)
    assert average(**given).isfinite().all()
    average.load_state_dict(copy.deepcopy(average.state_dict()))


@every_weighted
def test_a_scaled_and_clipped_step(layer):
    """GradScaler gives the step of an unscaled loss, and clip_grad_norm_ the same norm; autocast runs."""
    results = []
    for scaled in (False, True):
        module, given = made(layer), converted(forward_samples(layer), torch.float32)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        scaler.scale(module(**given).sum()).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
        results.append([norm, *module.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        result = made(layer)(**forward_samples(layer))
    assert result.isfinite().all()


@every_weighted
def test_an_overflown_step_is_left_out(layer):
    module, given = made(layer), converted(forward_samples(layer), torch.float32)
    optimizer, before = torch.optim.SGD(module.parameters(), lr=0.1), [p.clone() for p in module.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    (scaler.scale(module(**given).sum()) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, start) for p, start in zip(module.parameters(), before, strict=True))
    assert scaler.get_scale() < 2.0**20
