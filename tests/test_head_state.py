"""What a head keeps besides its weight, wherever torch takes it: class weights, bounds, margins."""

import copy
import io
import pickle
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import normface_ext as nf
from normface_ext import theory
from normface_ext.softmax.adaface import HeldMargin

C, D = 5, 8
FACTORS = torch.arange(1.0, C + 1)


def head(**options):
    return nf.NormFaceLoss(D, C, **{"scale": 20.0, **options})


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, D), torch.tensor([0, 1, 2, 3, 4, 0])


def silent(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **options)


# What no state_dict has -----------------------------------------------------------------------------

#: Ways by which a head loses its memory, from a head with it.
TRIPS = {
    "meta, to_empty": lambda made: made.to("meta").to_empty(device="cpu"),
    "to_empty": lambda made: made.to_empty(device="cpu"),
    "in a module": lambda made: nn.Sequential(made).to("meta").to_empty(device="cpu")[0],
    "twice": lambda made: made.to("meta").double().to("meta").to_empty(device="cpu").float(),
    "assign": lambda made: made.to("meta"),
}
KEPT = {
    "class_weight": {"class_weight": FACTORS},
    "margin": {"margin": nf.ArcFace(FACTORS / 8)},
    "0-d margin": {"margin": nf.CosFace(torch.tensor(0.25))},
    "all": {"class_weight": FACTORS, "margin": nf.CombinedMargin(m2=FACTORS / 8, m3=torch.tensor(0.125))},
}


@pytest.mark.parametrize("trip", TRIPS)
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("start", ["cpu", "meta"])
def test_what_is_no_state_outlives_its_memory(trip, kept, start, batch):
    whole = head(**kept)
    made = TRIPS[trip](head(**kept, device=start))
    silent(made.load_state_dict, whole.state_dict(), assign=trip == "assign")
    assert torch.equal(made(*batch), whole(*batch))
    assert list(made.state_dict()) == ["weight", "_extra_state"]


def test_class_weight_wants_values():
    text = "^NormFaceLoss: expected `class_weight` to have values, got a tensor on the meta device"
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=text):
            head(class_weight=FACTORS.to("meta"), device=device)
        made = head(class_weight=FACTORS, device=device)
        with pytest.raises(ValueError, match=text):
            made.class_weight = FACTORS.to("meta")
        with pytest.raises(ValueError, match=text.replace("class_weight", "margin.m")):
            made.margin = nf.ArcFace(FACTORS.to("meta"))
        assert torch.equal(made.given_class_weight(), FACTORS) and made.margin is None


def test_reset_under_a_meta_device(batch):
    made = head(class_weight=FACTORS, device="meta", learn_scale=True).to_empty(device="cpu")
    with torch.device("meta"):
        made.reset_parameters()
    assert torch.equal(made.class_weight, FACTORS) and made(*batch).isfinite() and made.scale.item() == 20


def test_a_class_weight_of_an_earlier_state_dict_is_left(batch):
    for made in (head(), head(class_weight=FACTORS)):
        before, model = made.class_weight, nn.Sequential(made)
        model.load_state_dict({**model.state_dict(), "0.class_weight": 7 * FACTORS})
        assert made.class_weight is before


# Bounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [head, lambda **options: nf.NormLinear(D, C, **options)], ids=["loss", "linear"]
)
@pytest.mark.parametrize(
    "bounds", [{}, {"max_scale": 15.0}, {"min_scale": 2.0}, {"min_scale": 2.0, "max_scale": 15.0}]
)
def test_bounds_travel(make, bounds):
    made = make(scale=10.0, learn_scale=True, **bounds)
    with torch.no_grad():
        made.scale.fill_(40.0)
    for mine in ({}, {"max_scale": 60.0}):
        other = make(scale=10.0, learn_scale=True, **mine)
        if (made.min_scale, made.max_scale) == (other.min_scale, other.max_scale):
            silent(other.load_state_dict, made.state_dict())
        else:
            with pytest.warns(
                UserWarning, match=r"of the state_dict, scale bounds \[.*\] replace \["
            ) as caught:
                other.load_state_dict(made.state_dict())
            assert len(caught) == 1
        assert (other.min_scale, other.max_scale) == (made.min_scale, made.max_scale)
        assert other.scale.item() == 40 and other.scale_value() == made.scale_value()


def test_bounds_go_through_our_own_file(tmp_path):
    made = head(learn_scale=True, min_scale=3.0, max_scale=25.0)
    with torch.no_grad():
        made.scale.fill_(40.0)
    nf.save_head(made, tmp_path / "head.pt")
    again = nf.load_head(tmp_path / "head.pt").head
    assert (again.min_scale, again.max_scale) == (3.0, 25.0)
    assert again.scale.item() == 40 and again.scale_value() == 25


def test_the_first_scale_follows_the_bounds():
    made = head(learn_scale=True)
    made.max_scale = 15.0
    made.reset_parameters()
    assert made.first_scale == made.scale.item() == 15
    for learned in (False, True):
        with pytest.raises(ValueError, match="expected `min_scale` <= `max_scale`, got 5 and 2"):
            head(learn_scale=learned, min_scale=5.0, max_scale=2.0)


@pytest.mark.parametrize("raw", [float("inf"), 1e30, 30.0])
def test_a_scale_past_its_bound_is_the_bound(raw, batch):
    made = head(learn_scale=True, max_scale=25.0)
    with torch.no_grad():
        made.scale.fill_(raw)
        assert torch.equal(made(batch[0]), nf.functional.norm_linear(batch[0], made.weight, 25.0))


# What may be set as the scale -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.tensor([[9.0]]), ValueError),
        (torch.tensor([9.0, 9.0]), ValueError),
        (torch.tensor([9]), TypeError),
        (torch.tensor([float("nan")]), ValueError),
        (torch.tensor(float("inf")), ValueError),
        (torch.tensor([30.0]), ValueError),
        (torch.tensor(-1.0), ValueError),
    ],
    ids=str,
)
@pytest.mark.parametrize("learned", [False, True])
def test_a_parameter_that_is_no_scale_is_refused(value, error, learned):
    made = head(learn_scale=learned, max_scale=25.0)
    before = made.scale
    with pytest.raises(error, match=r"^NormFaceLoss: expected `scale` "):
        made.scale = nn.Parameter(value, requires_grad=value.is_floating_point())
    assert made.scale is before


def test_a_number_that_the_dtype_cannot_hold():
    for number in (1e6, 1e-9):
        options = {"learn_scale": True, "min_scale": 1e-10, "dtype": torch.float16}
        with pytest.raises(ValueError, match=r"`scale` to be a number that torch\.float16 can hold"):
            head(scale=number, **options)
        made = head(**options)
        with pytest.raises(ValueError, match=r"`scale` to be a number that torch\.float16 can hold"):
            made.scale = number
        assert made.scale.item() == 20


def test_a_scale_of_a_state_dict_may_stand_outside():
    for assign in (False, True):
        made, other = head(learn_scale=True, max_scale=25.0), head(learn_scale=True, max_scale=25.0)
        with torch.no_grad():
            made.scale.fill_(-3.0)
        silent(other.load_state_dict, made.state_dict(), assign=assign)
        assert other.scale.item() == -3 and other.scale_value() == other.min_scale
        twin = head(max_scale=25.0)
        twin.scale = made.scale  # one that is a scale already
        assert twin.scale is made.scale


class Exp(nn.Module):
    def forward(self, x):
        return x.exp()

    def right_inverse(self, x):
        return x.log()


def test_a_parametrized_scale(batch):
    made = head(learn_scale=True, max_scale=25.0)
    parametrize.register_parametrization(made, "scale", Exp())
    assert made.learn_scale and made.scale_value() == pytest.approx(20)
    made.scale = 21.0
    assert made.scale.item() == pytest.approx(21)
    with torch.no_grad():
        made.parametrizations.scale.original.fill_(4.5)
    assert made.scale_value() == 25 and "max_scale=25" in repr(made)
    assert torch.equal(made(batch[0]), nf.functional.norm_linear(batch[0], made.weight, 25.0))
    made(*batch).backward()
    assert made.parametrizations.scale.original.grad is not None
    twin = head(learn_scale=True, max_scale=25.0)
    parametrize.register_parametrization(twin, "scale", Exp())
    silent(twin.load_state_dict, made.state_dict())
    assert twin.scale.item() == made.scale.item()


def replica(made):
    """As torch.nn.parallel.replicate makes one."""
    twin = made._replicate_for_data_parallel()
    for name, child in made._modules.items():
        setattr(twin, name, child)
    for name, value in made._parameters.items():
        setattr(twin, name, value * 1.0)
    for name, value in made._buffers.items():
        setattr(twin, name, value)
    return twin


MARGINS = {
    "none": lambda: None,
    "number": lambda: nf.ArcFace(0.5),
    "buffer": lambda: nf.CosFace(FACTORS / 16),
    "parameter": lambda: nf.ArcFace(nn.Parameter(torch.tensor(0.5))),
    "module": nf.MagFace,
}


@pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
def test_replicas_of_data_parallel(margin, batch):
    made = head(learn_scale=True, max_scale=25.0, margin=margin(), class_weight=FACTORS)
    with torch.no_grad():
        made.scale.fill_(40.0)
    twin = replica(made)
    assert twin.learn_scale and torch.equal(twin(*batch), made(*batch))
    twin(*batch).backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


# Margins in the state_dict --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class ArcFace(nf.CosFace):
    """Of the name of one of ours."""

    m: float = 0.3


@dataclass(frozen=True, eq=False, repr=False)
class Reserved(nf.CosFace):
    """With names that stand for something else in a state."""

    m: float = 0.3
    kind: float = 0.0
    kind_: float = 0.0
    tensors: float = 0.0


def test_numbers_of_any_name():
    saved = Reserved(0.25, 1.0, 2.0, 3.0)
    made, other = head(margin=saved), head(margin=Reserved())
    with pytest.warns(UserWarning, match="Reserved"):
        other.load_state_dict(made.state_dict())
    found = other.margin
    assert (found.m, found.kind, found.kind_, found.tensors) == (0.25, 1.0, 2.0, 3.0)


def test_a_batch_margin_gets_what_its_constructor_was_given():
    for saved, mine in (
        (nf.AdaFace(0.2, h=0.5), nf.AdaFace()),
        (nf.MagFace(l_a=5.0), nf.MagFace()),
        (nf.ElasticArcFace(0.25, plus="released"), nf.ElasticArcFace()),
        (nf.ElasticCosFace(0.25, std=0.125, plus=True), nf.ElasticCosFace()),
        (nf.CurricularFace(0.25, alpha=0.5), nf.CurricularFace()),
        (nf.MVSoftmax(0.25, kind="am", adaptive=False), nf.MVSoftmax()),
    ):
        made, other = head(margin=saved), head(margin=mine)
        with pytest.warns(UserWarning, match=f"margin {type(mine).__name__}.* replaces ") as caught:
            other.load_state_dict(made.state_dict())
        assert len(caught) == 1 and other.margin is mine and repr(mine) == repr(saved)
        silent(other.load_state_dict, made.state_dict())


@pytest.mark.parametrize(
    ("saved", "mine"),
    [
        (nf.ArcFace(0.5), nf.MagFace()),
        (None, nf.ElasticArcFace()),
        (nf.MagFace(), nf.ArcFace(0.5)),
        (nf.MagFace(), None),
        (nf.ElasticArcFace(), nf.MagFace()),
        (nf.ArcFace(FACTORS / 8), nf.ArcFace(0.5)),
        (nf.ArcFace(FACTORS / 8), nf.CosFace(FACTORS / 8)),
        (HeldMargin(m3=0.25), nf.CosFace(0.25)),
    ],
    ids=str,
)
def test_a_margin_that_numbers_do_not_make_is_not_taken(saved, mine):
    made, other = head(margin=saved), head(margin=mine)
    with pytest.warns(UserWarning, match="of the state_dict, margin .* is not taken, .* stays") as caught:
        other.load_state_dict(made.state_dict())
    assert len(caught) == 1 and other.margin is other.options.margin and repr(other.margin) == repr(mine)


def test_classes_are_compared_exactly():
    made, other = head(margin=ArcFace(0.25)), head(margin=nf.ArcFace(0.5))
    with pytest.warns(UserWarning, match=r"margin ArcFace\(m=0.25\) replaces"):
        other.load_state_dict(made.state_dict())
    assert type(other.margin) is ArcFace
    with pytest.warns(UserWarning, match="replaces"):
        made.load_state_dict(head(margin=nf.ArcFace(0.5)).state_dict())
    assert type(made.margin) is nf.ArcFace


def test_nothing_is_said_of_the_same_margin_and_nothing_is_half_taken():
    for margin in MARGINS.values():
        silent(head(margin=margin()).load_state_dict, head(margin=margin()).state_dict())
    guarded = head(margin=nf.ArcFace(FACTORS / 8))
    with pytest.warns(UserWarning, match="replaces"):
        guarded.load_state_dict(head(margin=nf.ArcFace(FACTORS / 16, guard="easy")).state_dict())
    assert guarded.margin.guard == "easy" and torch.equal(guarded.margin.m, FACTORS / 8)


@pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
def test_a_report_says_what_margin_was_stored(margin, tmp_path):
    given = margin()
    nf.save_head(head(margin=given), tmp_path / "head.pt")
    loaded, report = nf.load_head(tmp_path / "head.pt")
    name = "None" if given is None else type(given).__name__
    assert report.margin.startswith(name) and f"  margin: {name}" in str(report)
    if isinstance(getattr(given, "m", None), nn.Parameter):
        assert torch.equal(loaded.margin_m, given.m) and loaded.margin.m is loaded.margin_m
    elif name in ("MagFace", "CosFace"):  # its numbers are no numbers, or nowhere
        assert loaded.margin is None and f"{report.margin} is stored" in str(report)


# Margins that are learned ---------------------------------------------------------------------------

LEARNED = {
    "0-d": lambda: nf.ArcFace(nn.Parameter(torch.tensor(0.5))),
    "[C]": lambda: nf.CosFace(nn.Parameter(FACTORS / 16)),
    "both": lambda: nf.CombinedMargin(m2=nn.Parameter(FACTORS / 16), m3=torch.tensor(0.125)),
}
every_learned = pytest.mark.parametrize("margin", LEARNED.values(), ids=LEARNED)


def names(margin):
    return {f"margin_{name}" for name, value in vars(margin).items() if isinstance(value, nn.Parameter)}


@every_learned
@pytest.mark.parametrize("late", [False, True])
def test_a_learned_margin_is_the_heads(margin, late, batch):
    given = margin()
    made = head(margin=None if late else given)
    made.margin = given
    assert made.margin == given and names(given) == dict(made.named_parameters()).keys() - {"weight"}
    made(*batch).backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    decayed, rest = nf.parameter_groups(made, weight_decay=0.1)
    assert decayed["params"] == [made.weight] and rest["weight_decay"] == 0
    assert len(rest["params"]) == len(names(given))
    made.margin = nf.ArcFace(0.5)
    assert list(made.state_dict()) == ["weight", "_extra_state"] and not hasattr(made, "margin_m")


def through_pickle(made):
    return pickle.loads(pickle.dumps(made))


def through_a_file(made):
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_state(made):
    twin = head(
        margin=replace(
            made.margin,
            **{
                n: nn.Parameter(torch.zeros_like(v))
                for n, v in vars(made.margin).items()
                if isinstance(v, nn.Parameter)
            },
        )
    )
    silent(twin.load_state_dict, made.state_dict())
    return twin


def assigned(made):
    twin = copy.deepcopy(made).to("meta")
    silent(twin.load_state_dict, made.state_dict(), assign=True)
    return twin


@every_learned
@pytest.mark.parametrize("trip", [copy.deepcopy, through_pickle, through_a_file, through_a_state, assigned])
def test_a_learned_margin_travels(margin, trip, batch):
    made = head(margin=margin())
    twin = trip(made)
    for name in vars(made.margin):
        value = getattr(twin.margin, name)
        assert not isinstance(value, torch.Tensor) or value is getattr(twin, f"margin_{name}")
        assert not isinstance(value, nn.Parameter) or value is not getattr(made.margin, name)
    assert torch.equal(twin(*batch), made(*batch))
    twin(*batch).backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())


@every_learned
def test_a_learned_margin_follows_its_head(margin, batch):
    x, labels = batch
    made = head(margin=margin()).double()
    assert all(v.dtype == torch.float64 for v in vars(made.margin).values() if isinstance(v, torch.Tensor))
    assert made(x.double(), labels).isfinite()
    moved = made.to("meta")
    assert moved(x.double().to("meta"), labels.to("meta")).is_meta
    constant = head(margin=nf.CosFace(FACTORS / 16)).bfloat16()
    assert constant.margin.m.dtype == torch.float32


@every_learned
def test_a_functional_call_has_the_margin_it_is_given(margin, batch):
    made = head(margin=margin())
    zeros = {name: torch.zeros(value.shape) for name, value in made.named_parameters() if name != "weight"}
    zeroed = replace(made.margin, **{name.removeprefix("margin_"): v for name, v in zeros.items()})
    wanted = head(margin=zeroed)
    wanted.weight = made.weight
    before = made(*batch)
    assert torch.equal(functional_call(made, zeros, batch), wanted(*batch))
    asked = {name: value.clone().requires_grad_() for name, value in zeros.items()}
    functional_call(made, asked, batch).backward()
    assert all(value.grad is not None for value in asked.values())
    assert torch.equal(made(*batch), before)


@every_learned
def test_a_learned_margin_compiles(margin, batch, compile_fully):
    made = head(margin=margin())
    loss = compile_fully(made)(*batch)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in made.parameters()]
    made.zero_grad()
    made(*batch).backward()
    torch.testing.assert_close(gradients, [parameter.grad for parameter in made.parameters()])


# Refused early --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nf.ArcFace, nf.CosFace, lambda m: nf.CombinedMargin(m2=m)])
def test_margins_are_counted(kind):
    wrong, text = kind(torch.zeros(C - 1)), rf"^NormFaceLoss: expected `margin.m2?` to have shape \[{C}\]"
    with pytest.raises(ValueError, match=text):
        head(margin=wrong)
    made = head(margin=nf.ArcFace(0.5))
    with pytest.raises(ValueError, match=text):
        made.margin = wrong
    assert made.margin == nf.ArcFace(0.5)
    assert head(margin=nf.RowMargin(m3=torch.zeros(3))).margin.m3.shape == (3,)


def test_small_refusals():
    with pytest.raises(ValueError, match="expected `workspace` >= 0, got -1"):
        head(workspace=-1)
    with pytest.raises(TypeError, match=r"auto_scale: expected `margin` to be CosFace, .* got str"):
        theory.auto_scale(10, "arcface")


def test_a_numpy_number_is_kept_as_a_plain_one():
    file = io.BytesIO()
    torch.save(nf.ArcFace(np.float64(0.5)), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == nf.ArcFace(0.5)
