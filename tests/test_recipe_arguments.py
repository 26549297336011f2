"""The recipes' options, states and memory; and pytorch-metric-learning, where it has the same losses."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normface_ext as nf
from normface_ext import recipes
from normface_ext.testing import make_rows

OWN = {
    "AdaCos": recipes.AdaCos,
    "P2SGrad": recipes.P2SGrad,
    "ProxyAnchor": recipes.ProxyAnchor,
    "ProxyNCA": recipes.ProxyNCA,
    "SoftTriple": recipes.SoftTriple,
    "UniFace": recipes.UniFace,
}
every = pytest.mark.parametrize("kind", OWN.values(), ids=OWN)
LABELS = torch.tensor([0, 4, 1, 1, 2, 0, 3])


@every
def test_states_go_and_come(kind):
    torch.manual_seed(1)
    head, twin = kind(8, 5), kind(8, 5)
    x = make_rows(7, 8, torch.float32)
    head(x, LABELS)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(head(x, LABELS), twin(x, LABELS))
    assert torch.equal(copy.deepcopy(head)(x, LABELS), copy.deepcopy(twin)(x, LABELS))
    empty = kind(8, 5, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert empty(x, LABELS).isfinite()
    torch.testing.assert_close(empty.weight.norm(dim=1), torch.ones(len(empty.weight)))


@every
def test_what_is_wrong_is_said(kind):
    name, x = kind.__name__, make_rows(7, 8, torch.float32)
    head = kind(8, 5)
    for call, error, sentence in [
        (lambda: kind(0, 5), ValueError, rf"{name}: expected `in_features` >= 1, got 0"),
        (lambda: kind(8, 0), ValueError, rf"{name}: expected `num_classes` >= [123], got 0"),
        (lambda: kind(8, 5.0), TypeError, rf"{name}: expected `num_classes` to be an int, got float"),
        (lambda: kind(8, 5, eps=-1.0), ValueError, rf"{name}: expected `eps` to be finite and >= 0"),
        (lambda: kind(8, 5, ignore_index=1.5), TypeError, rf"{name}: expected `ignore_index` to be an int"),
        (lambda: kind(8, 5, colour=1), TypeError, rf"{name}: got an unexpected keyword argument `colour`"),
        (lambda: setattr(head, "eps", "x"), TypeError, rf"{name}: expected `eps` to be a number"),
        (lambda: head(x[:, :3], LABELS), ValueError, r"\w+: expected `weight` to be"),
        (lambda: head(x, LABELS[:3]), ValueError, r"\w+: expected `labels` to have shape \[7\]"),
        (lambda: head(x, LABELS + 1), IndexError, r"\w+: expected `labels` in \[0, 5\) or ignore_index"),
        (lambda: head(x, LABELS.float()), TypeError, r"\w+: expected `labels` to be int64 or int32"),
        (lambda: head(x, LABELS, torch.ones(3)), ValueError, r"\w+: expected `sample_weight` to have shape"),
    ]:
        with pytest.raises(error, match=f"^{sentence}"):
            call()
    assert head(x, LABELS.int()).isfinite()


@pytest.mark.parametrize(
    "kind, option, value, error",
    [
        (recipes.AdaCos, "dynamic", 1, TypeError),
        (recipes.AdaCos, "reduction", "max", ValueError),
        (recipes.P2SGrad, "form", "mine", ValueError),
        (recipes.ProxyNCA, "form", None, ValueError),
        (recipes.ProxyNCA, "softmax_scale", 0, ValueError),
        (recipes.ProxyAnchor, "alpha", -1, ValueError),
        (recipes.ProxyAnchor, "margin", float("nan"), ValueError),
        (recipes.ProxyAnchor, "reduction", "mean", TypeError),
        (recipes.SoftTriple, "gamma", 0, ValueError),
        (recipes.SoftTriple, "la", 0, ValueError),
        (recipes.SoftTriple, "tau", -0.1, ValueError),
        (recipes.SoftTriple, "centers", 0, ValueError),
        (recipes.UniFace, "scale", 0, ValueError),
        (recipes.UniFace, "margin", -1, ValueError),
        (recipes.UniFace, "negative_weight", "x", TypeError),
    ],
)
def test_options_are_checked(kind, option, value, error):
    with pytest.raises(error, match=rf"^{kind.__name__}: .*`{option}`"):
        kind(8, 5, **{option: value})


@pytest.mark.covering(0)
@pytest.mark.parametrize("kind", [recipes.UniFace, recipes.P2SGrad, recipes.ProxyAnchor, recipes.SoftTriple])
def test_a_compiled_step_refuses_a_label_that_is_no_class(kind, compile_fully):
    """Where nothing but the device can look."""
    call = compile_fully(kind(8, 5))
    x = make_rows(7, 8, torch.float32)
    assert call(x, LABELS).isfinite()
    with pytest.raises(RuntimeError, match="expected `labels` in"):
        call(x, LABELS + 1)


def test_the_threshold_of_uniface_is_learned_and_wide():
    head = recipes.UniFace(8, 5).bfloat16()
    assert head.bias.dtype == torch.float32 and head.weight.dtype == torch.bfloat16
    assert float(head.bias.detach()) == pytest.approx(3.912023, rel=1e-6)
    head(make_rows(7, 8, torch.bfloat16), LABELS).backward()
    assert head.bias.grad.dtype == torch.float32 and head.bias.grad.abs() > 0
    assert head.half().bias.grad.dtype == torch.float32


#: The loss there: its sizes, options and parameter; the recipe and its options.
PAIRS = {
    "ProxyAnchorLoss": ((5, 8), {}, "proxies", recipes.ProxyAnchor, {}),
    "ProxyNCALoss": (
        (5, 8), {"softmax_scale": 3}, "proxies", recipes.ProxyNCA, {"form": "pml", "softmax_scale": 3},
    ),
    "SoftTripleLoss": ((5, 8), {}, "fc", recipes.SoftTriple, {"tau": 0}),
    "NormalizedSoftmaxLoss": ((5, 8), {}, "W", recipes.NormSoftmax, {}),
    "P2SGradLoss": ((8, 5), {}, "weight", recipes.P2SGrad, {"form": "pml"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_the_loss_of_pytorch_metric_learning(name):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(2)
    sizes, given, parameter, kind, options = PAIRS[name]
    theirs = getattr(losses, name)(*sizes, **given)
    theirs = theirs.double()
    ours = kind(8, 5, dtype=torch.float64, **options)
    other = getattr(theirs, parameter)
    columns = other.shape[0] == 8
    with torch.no_grad():
        ours.weight.copy_(other.T if columns else other)
    rows = torch.randn(7, 8, dtype=torch.float64)
    x = [rows.clone().requires_grad_() for _ in range(2)]
    expected, found = theirs(x[0], LABELS), ours(x[1], LABELS)
    expected.backward()
    found.backward()
    # P2SGradLoss makes unit rows by torch.renorm, to 1e-7.
    near = {"rtol": 1e-5, "atol": 1e-6} if name == "P2SGradLoss" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found, expected, **near)
    torch.testing.assert_close(x[1].grad, x[0].grad, **near)
    dweight = other.grad.T if columns else other.grad
    if name == "P2SGradLoss":  # it does not differentiate through the unit rows
        dweight = dweight - (dweight * ours.weight).sum(1, keepdim=True) * ours.weight
    torch.testing.assert_close(ours.weight.grad, dweight.detach(), **near)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which an op returned."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.most = max([self.most, *made])
        return result


N, MANY = 256, 3000
WITHOUT = {
    "NormSoftmax": lambda **given: recipes.NormSoftmax(8, MANY, **given),
    "LDAM": lambda **given: recipes.LDAM(8, MANY, torch.arange(1, MANY + 1), **given),
    "KappaFace": lambda **given: nf.NormFaceLoss(
        8, MANY, margin=recipes.KappaFace(torch.arange(1, MANY + 1), 8), **given
    ),
    "AdaCos": lambda **given: recipes.AdaCos(8, MANY, **given),
    "ProxyNCA": lambda **given: recipes.ProxyNCA(8, MANY, **given),
    "ProxyNCA pml": lambda **given: recipes.ProxyNCA(8, MANY, form="pml", **given),
    "P2SGrad": lambda workspace: recipes.P2SGrad(8, MANY),
}


@pytest.mark.parametrize("make", WITHOUT.values(), ids=WITHOUT)
def test_no_matrix_of_rows_by_classes_is_built(make):
    """With a budget of a tenth of it: the kernels may keep their coefficients where there is room."""
    head, x = make(workspace=N * MANY * 4 // 10), torch.randn(N, 8, requires_grad=True)
    with Largest() as largest:
        head(x, torch.arange(N)).backward()
    assert 0 < largest.most < N * MANY // 8 and x.grad.any() and head.weight.grad.any()


def test_the_page_has_an_example_of_every_recipe():
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in recipes.__all__ if f"nf.recipes.{name}(" not in page] == []
