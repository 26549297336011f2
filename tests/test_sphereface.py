"""SphereFace: its schedule as state, and features that keep their length, in any head."""

import io
import math

import every_head_jobs as jobs
import pytest
import torch
import torch.nn.functional as F
from dense_head import OPTIONS, assert_equal_to_1e10, counted, gradients, on, problem
from ranks import ranks
from torch.utils.checkpoint import checkpoint

import normface_ext as nf
from normface_ext.caffe.sphere import angular


def head_of(weight, **options):
    head = nf.NormFaceLoss(weight.shape[1], weight.shape[0], dtype=weight.dtype, **options)
    head.weight.data.copy_(weight)
    return head


# phi --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_phi_is_the_polynomial_of_the_released_nets(m):
    """Value and slope, at the ends too, where the angle has none."""
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64, requires_grad=True)
    phi = nf.reference.phi(cosines, m)
    expected, slope = angular(cosines.detach(), m)
    torch.testing.assert_close(phi.detach(), expected, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(phi.sum(), cosines)
    torch.testing.assert_close(found[1:-1], slope[1:-1], rtol=1e-9, atol=1e-9)
    assert found.isfinite().all()


@pytest.mark.parametrize("m", [1.0, 1.7, 2.5, 4.0, 6.3])
def test_phi_falls_all_the_way(m):
    theta = torch.linspace(0, math.pi, 4001, dtype=torch.float64)
    phi = nf.reference.phi(theta.cos(), m)
    assert (phi.diff() < 1e-12).all()
    assert float(phi[0]) == 1 and phi.diff().abs().max() < 0.01


# The schedule -----------------------------------------------------------------------------------------

#: Released schedules: of the Caffe net and wespeaker, of clcarwin's port, of SV-X-Softmax.
SCHEDULES = {
    "caffe": ({}, lambda t: max(5.0, 1000 / (1 + 0.12 * t))),
    "clcarwin": ({"base": 1500, "gamma": 0.1}, lambda t: max(5.0, 1500 / (1 + 0.1 * t))),
    "sv-x": (
        {"gamma": 1e-4, "power": 2, "lambda_min": 0},
        lambda t: 1000 * (1 + 1e-4 * t) ** -2,
    ),
    "none": ({"base": 0, "lambda_min": 0}, lambda t: 0.0),
}


@pytest.mark.parametrize("first", [0, 3, 100_000])
@pytest.mark.parametrize("given, blend", SCHEDULES.values(), ids=SCHEDULES)
def test_lambda_is_that_of_the_pass(lane, given, blend, first):
    x, weight, labels = problem()
    margin = nf.SphereFace(**given).to(lane.device)
    margin.iteration.fill_(first)
    kept = labels != -100
    for t in (first + 1, first + 2):
        found = nf.functional.normface_loss(
            lane.tensor(x), lane.tensor(weight), lane.tensor(labels), 16.0, margin=margin
        )
        cos = F.normalize(x[kept]) @ F.normalize(weight).T
        own = cos.gather(1, labels[kept, None])
        psi = (blend(t) * own + angular(own, 4)[0]) / (1 + blend(t))
        expected = F.cross_entropy(16 * cos.scatter(1, labels[kept, None], psi), labels[kept])
        assert float(found) == pytest.approx(float(expected), rel=1e-12)
    assert margin.iteration.tolist() == [first + 2] and margin.iteration.dtype == torch.int64


def test_evaluation_does_not_count_and_has_the_lambda_of_the_last_step():
    x, weight, labels = problem()
    head = head_of(weight, scale=16.0, margin=nf.SphereFace(base=4, gamma=1, lambda_min=0))
    last = [head(x, labels), head(x, labels)][1]
    head.eval()
    assert head(x, labels) == last == head(x, labels)
    assert head.margin.iteration.item() == 2


def test_a_run_is_resumed_where_it_was():
    x, weight, labels = problem()
    head, other = (head_of(weight, scale=16.0, margin=nf.SphereFace()) for _ in range(2))
    head(x, labels)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.margin.iteration.item() == 1
    assert head(x, labels) == other(x, labels)
    other.margin.reset_parameters()
    assert other.margin.iteration.item() == 0
    head.half()
    assert head.margin.iteration.dtype == torch.int64


def test_a_pass_that_is_run_again_counts_once():
    x, weight, labels = problem()
    found = []
    for again in (False, True):
        head = head_of(weight, scale=16.0, margin=nf.SphereFace(base=4, gamma=1, lambda_min=0))
        leaf = x.clone().requires_grad_()
        for _ in range(2):
            given = labels.clone()
            loss = checkpoint(head, leaf, given, use_reentrant=False) if again else head(leaf, given)
            loss.backward()
        found.append([loss.detach(), leaf.grad, head.weight.grad, head.margin.iteration.double()])
    assert_equal_to_1e10(*found)


def test_compiled_it_counts(compile_fully):
    x, weight, labels = problem()
    results = []
    for compiled in (False, True):
        head = head_of(weight, margin=nf.SphereFace(base=4, gamma=1), normalize_input=False)
        step = compile_fully(head) if compiled else head
        leaf = x.clone().requires_grad_()
        for _ in range(3):
            step(leaf, labels).backward()
        results.append([leaf.grad, head.weight.grad, head.margin.iteration.double()])
    assert_equal_to_1e10(*results)
    assert results[0][2] == 3


def test_a_wrong_factor_is_refused():
    with pytest.raises(ValueError, match=r"^SphereFace: expected `m` to be finite and >= 1, got 0.5"):
        nf.SphereFace(0.5)


# Features as long as they are -------------------------------------------------------------------------


def long_loss(x, weight, labels, scale, psi=lambda c: c, *, reduction="mean", class_weight=None,
              sample_weight=None, label_smoothing=0.0):  # fmt: skip
    """Logits <x, w_hat>, with |x| psi in the label's place."""
    kept = counted(labels, sample_weight)
    y, rows = labels[kept], torch.arange(int(kept.sum()))
    logits = F.linear(x[kept], F.normalize(weight))
    norms = x[kept].norm(dim=1)
    logits = logits.index_put((rows, y), norms * psi(logits[rows, y] / norms))
    each = F.cross_entropy(
        scale * logits, y, weight=class_weight, reduction="none", label_smoothing=label_smoothing
    )
    weights = torch.ones_like(norms) if sample_weight is None else sample_weight[kept]
    each = each * weights
    if reduction == "none":
        return torch.zeros(len(x), dtype=each.dtype).index_put((kept.nonzero()[:, 0],), each)
    of_class = 1.0 if class_weight is None else class_weight[y]
    return each.sum() if reduction == "sum" else each.sum() / (weights * of_class).sum()


MARGINS = {
    "none": (lambda: None, lambda c: c),
    "numbers": (lambda: nf.CosFace(0.35), lambda c: c - 0.35),
    "a function": (lambda: nf.ElasticCosFace(std=0.0, plus=True), lambda c: c - 0.35),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("scale", [1.0, 40.0])  # inside the fixed shift's window, and outside
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make, psi", MARGINS.values(), ids=MARGINS)
def test_logits_are_products_with_unit_classes(lane, make, psi, options, scale):
    x, weight, labels = problem()
    s = torch.tensor(scale, dtype=torch.float64)
    found = gradients(
        lambda x, w, s: nf.functional.normface_loss(
            x, w, lane.tensor(labels), s, normalize_input=False, margin=make(), eps=0.0, **on(lane, options)
        ),
        *(lane.tensor(t) for t in (x, weight, s)),
    )
    expected = gradients(lambda x, w, s: long_loss(x, w, labels, s, psi, **options), x, weight, s)
    for f, e in zip(found, expected, strict=True):
        size = max(1.0, float(e.abs().max()))
        torch.testing.assert_close(f.cpu() / size, e / size, rtol=1e-10, atol=1e-10)


def test_what_does_not_count_reaches_nothing(lane):
    x, weight, labels = problem()
    clean = gradients(
        lambda x, w: nf.functional.normface_loss(x, w, lane.tensor(labels), 1.0, normalize_input=False),
        lane.tensor(x),
        lane.tensor(weight),
    )
    x[labels == -100] = math.nan
    dirty = gradients(
        lambda x, w: nf.functional.normface_loss(x, w, lane.tensor(labels), 1.0, normalize_input=False),
        lane.tensor(x),
        lane.tensor(weight),
    )
    assert all(torch.equal(c, d) for c, d in zip(clean, dirty, strict=True))


def test_a_scale_of_every_row_is_multiplied_too(lane):
    x, weight, labels = problem()
    s = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    given = lane.tensor(x), lane.tensor(weight), lane.tensor(labels)
    found = nf.functional.normface_loss(*given, lane.tensor(s), normalize_input=False)
    norms = (x.square().sum(1) + 1e-12).sqrt()
    assert float(found) == pytest.approx(
        float(nf.functional.normface_loss(x, weight, labels, s * norms)), rel=1e-12
    )


def test_the_layer_without_normalised_features():
    x, weight, labels = problem()
    head = head_of(weight, normalize_input=False)
    assert head.scale == 1.0 and "normalize_input=False" in repr(head)
    assert head.loss_lower_bound() == 0.0
    torch.testing.assert_close(head.logits(x), F.linear(x, F.normalize(weight)))
    torch.testing.assert_close(head(x), head.logits(x))
    assert torch.equal(head.predict(x), head.logits(x).argmax(1))
    assert head(x, labels) == nf.functional.normface_loss(x, weight, labels, 1.0, normalize_input=False)
    learned = head_of(weight, scale=2.0, learn_scale=True, normalize_input=False)
    learned(x, labels).backward()
    assert learned.scale.grad.isfinite().all() and learned.scale.grad != 0


@pytest.mark.parametrize("sample_rate", [1.0, 0.999])  # at which no class is left out
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [1.0, 40.0])  # inside the fixed shift's window, and outside
def test_class_parallel_with_a_learned_scale(scale, reduction, sample_rate):
    """A rank without rows among them; what each row's length is all ranks are told."""
    results = ranks(3).run(jobs.long_features, scale, reduction, sample_rate)
    x, weight, labels = problem()
    s = torch.tensor([scale], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, s)]
    loss = nf.functional.normface_loss(x, weight, labels, s, normalize_input=False, reduction=reduction)
    dx, dw, ds = torch.autograd.grad(loss.sum(), leaves)
    size = max(1.0, float(loss.detach().abs().max()), float(dx.abs().max()))
    of_rows = torch.cat([found[0] for found in results]) if reduction == "none" else results[0][0]
    assert_equal_to_1e10([of_rows / size], [loss.detach() / size])
    assert_equal_to_1e10([torch.cat([found[1] for found in results]) / size], [dx / size])
    for found in results:
        if sample_rate == 1:
            assert_equal_to_1e10([found[2] / size], [dw / size])
        assert_equal_to_1e10([found[3] / size], [ds / size])
    logits = torch.cat([found[4] for found in results])
    torch.testing.assert_close(logits, scale * F.linear(x, F.normalize(weight)).detach())


@pytest.mark.parametrize(
    "name, scale, margin, long",
    [
        ("sphereface", 1.0, "SphereFace(m=4, base=1000, gamma=0.12, power=1, lambda_min=5)", True),
        (
            "sphereface-opensphere",
            30.0,
            "SphereFace(m=1.7, base=0, gamma=0.12, power=1, lambda_min=0)",
            False,
        ),
        ("circle", 256.0, "CircleSoftmax(m=0.25)", False),
    ],
)
def test_presets(name, scale, margin, long):
    head = nf.NormFaceLoss.preset(name, 16, 7)
    assert (head.scale, repr(head.margin), head.normalize_input) == (scale, margin, not long)
    assert head(*problem(dtype=torch.float32)[::2]).isfinite()
