"""What a user writes: logits and predictions, options as attributes, presets, and what a state_dict holds."""

import copy
import dataclasses
import io
import json
import typing
import warnings

import pytest
import torch
from torch import nn

import normface_ext as nf
from normface_ext import reference, theory
from normface_ext.cosine import options as cosine_options
from normface_ext.distances import options as distance_options
from normface_ext.functional import norm_linear, normface_loss
from normface_ext.softmax import options as softmax_options
from normface_ext.softmax.presets import PRESETS
from normface_ext.testing import assert_close_to_truth


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 12), torch.randint(20, (6,))


def head(**options):
    torch.manual_seed(1)
    return nf.NormFaceLoss(12, 20, **options)


# Logits and predictions -----------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("margin", [None, nf.ArcFace(0.5), nf.CosFace(0.3)], ids=str)
def test_without_labels_a_head_gives_logits(learned, margin, batch):
    made = head(scale=9.0, learn_scale=learned, margin=margin, eps=0.25)
    logits = made(batch[0])
    truth = 9.0 * reference.cosine(batch[0].double(), made.weight.double(), 0.25)
    assert_close_to_truth(logits, truth, None, "logits", floor=16)
    assert torch.equal(made.logits(batch[0]), logits)
    assert torch.equal(norm_linear(batch[0], made.weight, made.scale, eps=0.25), logits)
    logits.sin().sum().backward()
    assert made.weight.grad.abs().sum() > 0 and (not learned or made.scale.grad != 0)


def test_the_loss_is_the_cross_entropy_of_the_logits(batch):
    made = head(scale=9.0)
    expected = nn.functional.cross_entropy(made(batch[0]), batch[1])
    torch.testing.assert_close(made(*batch), expected)


def test_predictions_are_classes(batch):
    made = head(scale=9.0, margin=nf.ArcFace(0.5), learn_scale=True)
    classes = made.predict(batch[0])
    assert classes.dtype == torch.int64 and classes.shape == (6,) and not classes.requires_grad
    assert torch.equal(classes, made(batch[0]).argmax(1))
    assert torch.equal(made.predict(made.weight.detach()), torch.arange(20))
    with torch.no_grad():
        made.weight[[5, 11, 17]] = made.weight[3].clone()
    assert torch.equal(made.predict(made.weight[[17, 11, 5, 3]].detach()), torch.full((4,), 3))
    assert made.predict(batch[0][:0]).shape == (0,)


def test_sample_weight_needs_labels(batch):
    with pytest.raises(ValueError, match=r"^NormFaceLoss: expected `labels` together with `sample_weight`"):
        head()(batch[0], sample_weight=torch.ones(6))


# Autocast -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "made",
    [nf.NormLinear(12, 20, scale=8.0, learn_scale=True), nf.NormFaceLoss(12, 20, scale=8.0)],
    ids=lambda made: type(made).__name__,
)
def test_autocast_does_to_logits_what_it_does_to_a_linear_layer(made, dtype, kind, batch):
    made = copy.deepcopy(made)
    linear = nn.Linear(12, 20, bias=False)
    if dtype == torch.float64:
        made, linear = made.double(), linear.double()
    x = batch[0].to(dtype).requires_grad_()
    with torch.autocast("cpu", kind):
        out, expected = made(x), linear(x)
        assert torch.equal(norm_linear(x, made.weight, made.scale), out)
    assert out.dtype == expected.dtype == (torch.float64 if dtype == torch.float64 else kind)
    assert torch.equal(out, made(x if dtype == torch.float64 else x.to(kind)))
    out.sum().backward()
    assert x.grad.dtype == dtype and made.weight.grad.dtype == made.weight.dtype
    with torch.autocast("cpu", kind, enabled=False):
        assert made.to(dtype)(x).dtype == dtype


# Options --------------------------------------------------------------------------------------------

LAYERS = {
    "NormalizeLayer": lambda **o: nf.NormalizeLayer(**o),
    "NormLinear": lambda **o: nf.NormLinear(3, 4, **o),
    "NormFaceLoss": lambda **o: nf.NormFaceLoss(3, 4, **o),
    "InnerDistance": lambda **o: nf.InnerDistance(3, 4, **o),
    "PairContrastiveLoss": lambda **o: nf.PairContrastiveLoss(**o),
    "TripletLoss": lambda **o: nf.TripletLoss(**o),
}
WRONG = [
    ("margin", 0.5, TypeError, ["NormFaceLoss"]),
    ("margin", "arcface", TypeError, ["NormFaceLoss", "PairContrastiveLoss", "TripletLoss"]),
    ("margin", nf.ArcFace, TypeError, ["NormFaceLoss"]),
    ("margin", None, TypeError, ["PairContrastiveLoss", "TripletLoss"]),
    ("margin", float("nan"), ValueError, ["PairContrastiveLoss", "TripletLoss"]),
    ("reduction", "avg", ValueError, ["NormFaceLoss", "PairContrastiveLoss", "TripletLoss"]),
    ("reduction", None, ValueError, ["NormFaceLoss", "PairContrastiveLoss", "TripletLoss"]),
    ("p", 7, ValueError, ["NormalizeLayer", "InnerDistance"]),
    ("p", "2", ValueError, ["NormalizeLayer", "InnerDistance"]),
    ("dim", 1.0, TypeError, ["NormalizeLayer"]),
    ("eps", -1.0, ValueError, ["NormalizeLayer", "NormLinear", "NormFaceLoss", "InnerDistance"]),
    ("eps", None, TypeError, ["NormalizeLayer", "NormLinear", "NormFaceLoss", "InnerDistance"]),
    ("return_norm", 1, TypeError, ["NormalizeLayer"]),
    ("normalize_input", "yes", TypeError, ["NormLinear"]),
    ("normalize", 1, TypeError, ["InnerDistance"]),
    ("update_center_only", None, TypeError, ["InnerDistance"]),
    ("ignore_index", 0.5, TypeError, ["NormFaceLoss"]),
    ("label_smoothing", 1.0, ValueError, ["NormFaceLoss"]),
    ("workspace", "1", TypeError, ["NormFaceLoss"]),
    ("check_finite", 1, TypeError, ["NormFaceLoss"]),
    ("class_weight", torch.ones(3), ValueError, ["NormFaceLoss"]),
    ("class_weight", [1.0] * 4, TypeError, ["NormFaceLoss"]),
    ("class_weight", torch.ones(4, requires_grad=True), ValueError, ["NormFaceLoss"]),
]


@pytest.mark.parametrize(("name", "value", "error", "layers"), WRONG, ids=str)
def test_a_wrong_option_is_named_when_it_is_given(name, value, error, layers):
    for layer in layers:
        with pytest.raises(error, match=f"^{layer}: expected `{name}` "):
            LAYERS[layer](**{name: value})
        made = LAYERS[layer]()
        before = repr(made)
        with pytest.raises(error, match=f"^{layer}: expected `{name}` "):
            setattr(made, name, value)
        assert repr(made) == before


@pytest.mark.parametrize("layer", ["NormLinear", "NormFaceLoss", "InnerDistance", "TripletLoss"])
def test_an_unknown_option_is_named(layer):
    with pytest.raises(TypeError, match=f"^{layer}: got an unexpected keyword argument `temperature`"):
        LAYERS[layer](temperature=1.0)


@pytest.mark.parametrize("layer", ["NormLinear", "NormFaceLoss", "InnerDistance"])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("dtype", torch.int64, TypeError), ("dtype", "float32", TypeError), ("device", "gpu", ValueError)],
)
def test_dtype_and_device_are_checked(layer, name, value, error):
    with pytest.raises(error, match=f"^{layer}: expected `{name}` to be "):
        LAYERS[layer](**{name: value})


OTHER = {  # of every option another value than the default
    "dim": -1,
    "p": 1,
    "eps": 0.5,
    "return_norm": True,
    "normalize_input": False,
    "normalize": True,
    "update_center_only": True,
    "margin": 0.75,
    "reduction": "sum",
    "ignore_index": None,
    "label_smoothing": 0.25,
    "workspace": 1 << 30,
    "check_finite": True,
}


@pytest.mark.parametrize("layer", LAYERS)
def test_repr_shows_what_is_not_the_default_and_nothing_else(layer):
    given = {"scale": 8.0} if layer == "NormFaceLoss" else {}  # "auto" knows the margin
    plain = LAYERS[layer](**given)
    options = {name: OTHER.get(name) for name in plain.options.CHECKS if name in OTHER}
    if layer == "NormFaceLoss":
        options["margin"] = nf.CosFace(0.75)
    for name, value in options.items():
        assert f"{name}=" not in repr(plain)
        set_first = LAYERS[layer](**{name: value}, **given)
        assert f"{name}={value!r}" in repr(set_first)
        set_later = LAYERS[layer](**given)
        setattr(set_later, name, value)
        assert repr(set_later) == repr(set_first)
        assert getattr(set_later, name) == value == getattr(set_later.options, name)
        setattr(set_later, name, getattr(plain, name))
        assert repr(set_later) == repr(plain)


def test_repr_of_what_is_no_option():
    made = nf.NormFaceLoss(
        3, 4, scale=2.5, learn_scale=True, min_scale=0.5, max_scale=9, class_weight=torch.ones(4)
    )
    assert repr(made) == (
        "NormFaceLoss(3, 4, scale=2.5, learn_scale=True, min_scale=0.5, max_scale=9, class_weight=[4])"
    )


def test_an_attribute_that_is_set_is_what_runs(batch):
    made, x = head(scale=9.0), batch[0]
    made.margin, made.reduction, made.scale = nf.CosFace(0.3), "sum", 12.0
    made.class_weight = torch.arange(20.0)
    expected = normface_loss(
        x,
        made.weight,
        batch[1],
        12.0,
        class_weight=torch.arange(20.0),
        margin=nf.CosFace(0.3),
        reduction="sum",
    )
    assert torch.equal(made(*batch), expected)
    pairs = nf.TripletLoss()
    pairs.margin = 2
    assert torch.equal(pairs(x, -x, x), nf.functional.triplet_loss(x, -x, x, margin=2.0))


@pytest.mark.parametrize(
    "module", [cosine_options, softmax_options, distance_options], ids=lambda m: m.__name__
)
def test_static_type_checkers_are_told_of_the_same_options(module):
    """A TypedDict of keywords has the names of the dataclass that it stands beside."""
    found = [kind for kind in vars(module).values() if isinstance(kind, type)]
    own = [kind for kind in found if kind.__module__ == module.__name__]
    names = [{f.name for f in dataclasses.fields(kind)} for kind in own if dataclasses.is_dataclass(kind)]
    for kind in own:
        if typing.is_typeddict(kind):
            assert set(kind.__annotations__) in names, kind


# class_weight ---------------------------------------------------------------------------------------


def test_class_weight_is_no_part_of_the_state(batch):
    weighed, plain = head(class_weight=torch.arange(20.0)), head()
    assert set(weighed.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(weighed.state_dict())
    weighed.load_state_dict(plain.state_dict())
    assert torch.equal(weighed.class_weight, torch.arange(20.0)) and plain.class_weight is None
    twin = copy.deepcopy(weighed).double()
    assert twin.class_weight.dtype == torch.float64
    weighed.class_weight = None
    assert torch.equal(weighed(*batch), plain(*batch))


def test_class_weight_goes_where_the_weight_is(batch):
    made = head(class_weight=torch.arange(20.0), device="meta")
    assert made.class_weight.is_meta
    made.to_empty(device="cpu")
    made.reset_parameters()
    assert torch.equal(made.class_weight, torch.arange(20.0)) and made(*batch).isfinite()
    moved = head(device="meta")
    moved.class_weight = torch.ones(20)
    assert moved.class_weight.is_meta


# Presets --------------------------------------------------------------------------------------------


def test_presets_are_the_recipes():
    arcface, cosface = (nf.NormFaceLoss.preset(name, 12, 85_742) for name in ("arcface", "cosface"))
    assert (arcface.scale, arcface.margin) == (64.0, nf.ArcFace(0.5))
    assert (cosface.scale, cosface.margin) == (64.0, nf.CosFace(0.35))
    paper = nf.NormFaceLoss.preset("normface", 12, 10_575)
    assert paper.margin is None and paper.learn_scale
    assert paper.scale_value() == pytest.approx(theory.auto_scale(10_575))
    for name in PRESETS:
        assert nf.NormFaceLoss.preset(name, 5, 7)(torch.randn(2, 5), torch.tensor([0, 6])).isfinite()


def test_presets_can_be_changed_and_belong_to_the_class():
    class Mine(nf.NormFaceLoss):
        pass

    made = Mine.preset("arcface", 3, 4, scale=32.0, reduction="sum", dtype=torch.float64)
    assert type(made) is Mine and made.weight.dtype == torch.float64
    assert repr(made) == "Mine(3, 4, scale=32, margin=ArcFace(m=0.5), reduction='sum')"
    with pytest.raises(ValueError, match=r"`name` to be one of arcface, cosface, normface.*, got 'ArcFace'"):
        nf.NormFaceLoss.preset("ArcFace", 3, 4)
    with pytest.raises(TypeError, match="NormFaceLoss: got an unexpected keyword argument `m`"):
        nf.NormFaceLoss.preset("arcface", 3, 4, m=0.3)


# What the state_dict holds --------------------------------------------------------------------------

MARGINS = [
    None,
    nf.CosFace(0.35),
    nf.ArcFace(0.5),
    nf.ArcFace(1 / 3),
    nf.CombinedMargin(1.0, 0.3, 0.2),
    nf.CombinedMargin(m3=0.1),
]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("margin", MARGINS, ids=str)
@pytest.mark.parametrize("mine", [None, nf.ArcFace(0.1)], ids=str)
@pytest.mark.parametrize("scale", [64.0, 0.1, 1 / 3])
def test_scale_and_margin_travel(margin, mine, scale, batch):
    trained = head(scale=scale, margin=margin)
    state = through_a_file(trained.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in state.values())  # what safetensors asks for
    made = nf.NormFaceLoss(12, 20, scale=10.0, margin=mine)
    with pytest.warns(UserWarning, match="^NormFaceLoss: of the state_dict, ") as caught:
        made.load_state_dict(state)
    assert len(caught) == 1 and f"scale {scale:g} replaces 10" in str(caught[0].message)
    assert (f"margin {margin} replaces {mine}" in str(caught[0].message)) == (margin != mine)
    assert made.scale == scale and made.margin == margin and type(made.margin) is type(margin)
    assert torch.equal(made(*batch), trained(*batch))


def test_nothing_is_said_where_nothing_changes(batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"scale": 7.0, "margin": nf.ArcFace(0.5)}, {"scale": 7.0}, {"learn_scale": True}):
            head(**options).load_state_dict(through_a_file(head(**options).state_dict()))
        # Equal margins in other words.
        made = head(margin=nf.CombinedMargin(m3=0.25), scale=7.0)
        made.load_state_dict(head(margin=nf.CosFace(0.25), scale=7.0).state_dict())
        linear = nf.NormLinear(12, 20, scale=7.0)
        linear.load_state_dict(nf.NormLinear(12, 20, scale=7.0).state_dict())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_without_extra_state_loads_and_changes_nothing(strict, nested, batch):
    def wrapped(head):
        return nn.Sequential(nn.Linear(12, 12), head) if nested else head

    made = head(scale=7.0, margin=nf.ArcFace(0.5))
    state = {n: t for n, t in wrapped(head(scale=9.0)).state_dict().items() if "_extra_state" not in n}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = wrapped(made).load_state_dict(state, strict=strict)
    assert not answer.missing_keys and not answer.unexpected_keys
    assert made.scale == 7.0 and made.margin == nf.ArcFace(0.5)


def test_a_fixed_scale_of_norm_linear_travels(batch):
    made = nf.NormLinear(12, 20, scale=3.0)
    with pytest.warns(UserWarning, match=r"^NormLinear: of the state_dict, scale 16 replaces 3$"):
        made.load_state_dict(nf.NormLinear(12, 20, scale=16.0).state_dict())
    assert made.scale == 16.0 and type(made.scale) is float


def test_a_scale_out_of_bounds_is_not_taken():
    made = head(scale=3.0, max_scale=5.0)
    with pytest.raises(ValueError, match=r"expected `scale` in \[0.01, 5\], got 64"):
        made.load_state_dict(head(scale=64.0).state_dict())
    assert made.scale == 3.0


class ModuleMargin(nf.CosFace, nn.Module):
    """A margin with a state of its own."""

    def __init__(self, m):
        nn.Module.__init__(self)
        object.__setattr__(self, "m", m)
        self.register_buffer("seen", torch.zeros(()))


def test_a_margin_of_the_same_class_gets_its_numbers(batch):
    made, other = (head(scale=9.0, margin=ModuleMargin(m)) for m in (0.25, 0.5))
    made.margin.seen.fill_(3.0)
    state = through_a_file(made.state_dict())
    kind = f"{ModuleMargin.__module__}.ModuleMargin"
    saved = {"scale": 9.0, "margin": {"kind": kind, "m": 0.25}}
    assert json.loads(bytes(state["_extra_state"].tolist())) == saved
    with pytest.warns(UserWarning, match=r"margin .*ModuleMargin\(m=0.25\) replaces "):
        other.load_state_dict(state)
    assert other.margin.m == 0.25 and other.margin.seen == 3.0
    assert "margin=" not in other.extra_repr() and "(margin): ModuleMargin" in repr(other)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (torch.zeros(4), r"the extra state of a NormFaceLoss in the state_dict, got a torch.float32 tensor"),
        ({"scale": 3.0}, "got a dict"),
        (torch.full((8,), 200, dtype=torch.uint8), "got other bytes"),
        (torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8), "got other bytes"),
        ({"scale": "9"}, "expected `scale` to be a number, got str"),
        ({"scale": -1.0}, "expected `scale` to be finite and > 0, got -1"),
        ({"margin": 3}, "expected a margin in the state_dict, got int"),
        ({"margin": {"m": 0.1}}, "expected a margin in the state_dict, got dict"),
        ({"margin": {"kind": "ArcFace", "tensors": 1}}, "names of a margin's tensors in the state_dict"),
        ({"margin": {"kind": "ArcFace", "m": 7.0}}, r"got ArcFace: expected `m` in \[0, 3.14159\), got 7"),
        ({"margin": {"kind": "ArcFace", "n": 0.1}}, "expected a margin in the state_dict, got "),
    ],
    ids=str,
)
def test_an_extra_state_that_is_none_is_refused(state, text):
    if isinstance(state, dict) and text != "got a dict":
        state = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    made = head(scale=5.0)
    with pytest.raises((ValueError, TypeError), match=f"^NormFaceLoss: .*{text}"):
        made.load_state_dict({**made.state_dict(), "_extra_state": state})


def test_a_state_without_values_says_nothing():
    made = head(scale=5.0, margin=nf.ArcFace(0.5))
    state = {name: value.to("meta") for name, value in head(scale=9.0).state_dict().items()}
    made.to("meta").load_state_dict(state, assign=True)
    assert made.scale == 5.0 and made.margin == nf.ArcFace(0.5)


def test_averages_of_models(batch):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    made = head(scale=9.0, margin=nf.ArcFace(0.5), learn_scale=True, class_weight=torch.ones(20))
    average = AveragedModel(made, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(made)
    with torch.no_grad():
        made.scale.add_(2.0)
    average.update_parameters(made)
    assert average.module.scale.item() == 10.0 and average.module.margin == nf.ArcFace(0.5)
    restored = AveragedModel(head(learn_scale=True, margin=nf.ArcFace(0.5), class_weight=torch.ones(20)))
    restored.load_state_dict(through_a_file(average.state_dict()))
    assert torch.equal(restored(*batch), average(*batch))


def test_a_whole_module_goes_through_a_file(batch):
    made = head(scale=9.0, margin=nf.CombinedMargin(m2=0.25), class_weight=torch.ones(20))
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert repr(again) == repr(made) and torch.equal(again(*batch), made(*batch))
