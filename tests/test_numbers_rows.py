"""Rows of any magnitude keep their direction: denormal ones, and ones whose norm has no value in the dtype.

The law is exact: with eps = 0, what a row is multiplied by (a power of two) leaves every output as it is and
divides its gradient by the same. No reference is needed, and none could be had in float64.
"""

import pytest
import torch
from test_normface_loss import least_workspace

import normface_ext as nf

F = nf.functional

#: (power of two of the rows, of the upstream gradient): the row's gradient, their quotient, is a number.
POWERS = {
    torch.float32: [(-145, -25), (-132, -20), (-100, 0), (64, 0), (123, 20)],
    torch.bfloat16: [(-130, -20), (-100, 0), (123, 30)],
    torch.float16: [(-23, -10), (10, 0)],
    torch.float64: [(-1070, -60), (-700, 0), (512, 0), (1020, 40)],
}
CASES = [(dtype, *powers) for dtype, listed in POWERS.items() for powers in listed]
every_power = pytest.mark.parametrize(
    ("dtype", "power", "upstream"), CASES, ids=lambda v: str(v).split(".")[-1]
)


def integers(lane, rows, dim, dtype, seed=0):
    """Rows of small integers: exact in every dtype at every power, denormal ones too."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(1, 8, (rows, dim), generator=generator)
    return lane.tensor(made * (-1) ** torch.randint(2, (rows, dim), generator=generator), dtype)


def times_power(values, power):
    """In two steps: 2^-1070 is a number, and so is 2^1020, but not every product on the way."""
    return (values.double() * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)).to(values.dtype)


def obeys_the_law(call, rows, power, upstream, others=(), rtol=1e-3, name=""):
    """call(rows, *others), of rows as they are and of rows times 2^power; the gradients of all."""
    seen = []
    for exponent, factor in ((0, 0), (power, upstream)):
        scaled = times_power(rows, exponent)
        leaves = [t.detach().clone().requires_grad_() for t in (scaled, *others)]
        out = call(*leaves)
        generator = torch.Generator().manual_seed(1)
        g = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).to(out.device)
        out.backward(times_power(g, factor))
        seen.append((out.detach(), [leaf.grad.double() for leaf in leaves]))
    (plain, (dx, *dothers)), (got, (gx, *gothers)) = seen
    torch.testing.assert_close(got, plain, rtol=rtol, atol=rtol, msg=lambda m: f"{name}: {m}")
    for what, g, d, exponent in (
        ("its own gradient", gx, dx, upstream - power),
        *(("the gradient of the others", *pair, upstream) for pair in zip(gothers, dothers, strict=True)),
    ):
        assert g.isfinite().all(), f"{name}, {what}: {g.flatten()[:4].tolist()}"
        back = times_power(g, -exponent)
        error = ((back - d).norm() / d.norm()).item()
        assert error <= rtol, f"{name}, {what}: {error:.1e} off"


def tolerance(dtype):
    return {torch.float64: 1e-9, torch.float32: 2e-5}.get(dtype, 2e-2)


@every_power
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("shape", "dim"), [((5, 33), 1), ((5, 33), 0), ((2, 7, 19), 1)])
def test_normalize(lane, shape, dim, p, dtype, power, upstream):
    x = integers(lane, shape[0] * (shape[1] if len(shape) == 3 else 1), shape[-1], dtype).reshape(shape)
    obeys_the_law(lambda x: F.normalize(x, dim, p, 0.0), x, power, upstream, rtol=tolerance(dtype))


@every_power
def test_norm_linear(lane, dtype, power, upstream):
    x, weight = integers(lane, 5, 33, dtype), integers(lane, 7, 33, dtype, seed=1)
    rtol = tolerance(dtype)
    obeys_the_law(lambda x, w: F.norm_linear(x, w, 2.0, eps=0.0), x, power, upstream, (weight,), rtol, "x")
    obeys_the_law(
        lambda w, x: F.norm_linear(x, w, 2.0, eps=0.0), weight, power, upstream, (x,), rtol, "weight"
    )


@every_power
def test_normalised_agents(lane, dtype, power, upstream):
    x, weight = integers(lane, 5, 9, dtype), integers(lane, 7, 9, dtype, seed=1)

    def call(w, x):
        return F.inner_distance(x, w, normalize=True, eps=0.0)

    obeys_the_law(call, weight, power, upstream, (x,), tolerance(dtype))


#: (x, weight, labels, eps, workspace) -> losses: every way in which a unit row is made once more in backward.
HEADS = {
    "softmax": lambda x, w, y, eps, space: F.normface_loss(
        x, w, y, 4.0, reduction="none", eps=eps, workspace=space
    ),
    "smoothing": lambda x, w, y, eps, space: F.normface_loss(
        x, w, y, 4.0, reduction="none", eps=eps, workspace=space, label_smoothing=0.2
    ),
    "hinges, dense": lambda x, w, y, eps, space: F.c_contrastive_loss(
        x, w, y, reduction="none", eps=eps, workspace=space, neg_margin=1.6, active_limit=0
    ),
    "hinges, listed": lambda x, w, y, eps, space: F.c_triplet_loss(
        x, w, y, reduction="none", eps=eps, workspace=space, margin=0.3, active_limit=20
    ),
}


def head_inputs(lane, dtype):
    return integers(lane, 5, 33, dtype), integers(lane, 21, 33, dtype, seed=1), lane.labels(5, 21)


every_head = pytest.mark.parametrize("head", HEADS)


@every_head
@pytest.mark.parametrize("tight", [False, True])
@every_power
@pytest.mark.parametrize("scaled", ["features", "classes"])
def test_heads(lane, scaled, head, tight, dtype, power, upstream):
    x, weight, labels = head_inputs(lane, dtype)
    # The hinges make their products, and so their plan, in the accumulator type.
    wide = torch.promote_types(dtype, torch.float32) if head.startswith("hinges") else dtype
    space = least_workspace(lane, x.to(wide), weight.to(wide)) if tight else None
    rows, others = (x, weight) if scaled == "features" else (weight, x)

    def call(rows, others):
        x, weight = (rows, others) if scaled == "features" else (others, rows)
        return HEADS[head](x, weight, labels, 0.0, space)

    obeys_the_law(call, rows, power, upstream, (others,), tolerance(dtype))


@every_head
@pytest.mark.parametrize("place", [0, 1], ids=["feature", "class"])
def test_a_zero_row_reaches_nothing(lane, head, place):
    """Under eps = 0 a zero row stays zero, and its own gradient alone is divided by 0."""
    x, weight, labels = head_inputs(lane, torch.float32)
    zero = int(labels[2]) if place else 2
    (x, weight)[place][zero] = 0

    def gradients(eps):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = HEADS[head](*leaves, labels, eps, None)
        loss.sum().backward()
        return loss.detach(), [leaf.grad for leaf in leaves]

    # 1e-12 is nothing beside the length of the other rows.
    (loss, got), (expected, others) = gradients(0.0), gradients(1e-12)
    torch.testing.assert_close(loss, expected)
    assert not got[place][zero].isnan().any()
    for of in (got, others):
        of[place][zero] = 0
    torch.testing.assert_close(got, others)


@pytest.mark.parametrize("scale", [64.0, -64.0, 1.0])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", POWERS, ids=str)
def test_a_zero_row_of_norm_linear(lane, dtype, as_tensor, scale):
    """It stays zero whatever the scale, and without an upstream gradient it has none itself."""
    x, weight = integers(lane, 4, 8, dtype), integers(lane, 5, 8, dtype, 1)
    x[1] = 0
    weight[2] = 0
    upstream = lane.randn(4, 5, dtype=dtype)
    upstream[1] = 0
    upstream[:, 2] = 0

    def results(eps):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        factor = lane.tensor(torch.tensor(scale, dtype=torch.float64)) if as_tensor else scale
        out = F.norm_linear(*leaves, factor, eps=eps)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    got = results(0.0)
    for found, expected in zip(got, results(1e-12), strict=True):  # nothing beside the length of the rows
        torch.testing.assert_close(found, expected)
    assert not got[0][1].any() and not got[0][:, 2].any() and not got[1][1].any() and not got[2][2].any()
