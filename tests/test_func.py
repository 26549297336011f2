"""Under torch.func, and in forward mode, the ops are the reference's, or a sentence names the op."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_mode
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import normface_ext as nf

F, R = nf.functional, nf.reference
BATCH, CLASSES, DIM = 3, 4, 5
LABELS = torch.tensor([0, 3, 2])

#: name -> (library, x, weight, scale, labels) -> results
OPS = {
    "normalize": lambda lib, x, w, s, y: lib.normalize(x),
    "norm": lambda lib, x, w, s, y: lib.normalize(x, p=1, return_norm=True)[1],
    "norm_linear": lambda lib, x, w, s, y: lib.norm_linear(x, w, s),
    "loss": lambda lib, x, w, s, y: lib.normface_loss(x, w, y, s, margin=nf.ArcFace(0.2)),
    "rows": lambda lib, x, w, s, y: lib.normface_loss(x, w, y, s, reduction="none", label_smoothing=0.1),
    "learned": lambda lib, x, w, s, y: lib.normface_loss(x, w, y, 6.0, margin=nf.CosFace(s / 20)),
    "sub-centres": lambda lib, x, w, s, y: lib.normface_loss(
        x, torch.cat([w, w.cos()]), y, s, sub_centers=2, margin=nf.CosFace(0.2)
    ),
    "two labels": lambda lib, x, w, s, y: lib.normface_loss(
        x, w, y, s, labels_b=y.flip(0), lam=0.3, reduction="batchmean"
    ),
    "own lengths": lambda lib, x, w, s, y: lib.normface_loss(
        x, w, y, s, normalize_input=False, margin=nf.CircleSoftmax()
    ),
    "parts": lambda lib, x, w, s, y: torch.stack(lib.head_parts(x, w, y, s)[:2]),
    "c_contrastive": lambda lib, x, w, s, y: lib.c_contrastive_loss(
        x, w, y, exp_negative_weight=True, neg_margin=1.9, reduction="none"
    ),
    "c_triplet": lambda lib, x, w, s, y: lib.c_triplet_loss(x, w, y, margin=1.2),
    "hardest": lambda lib, x, w, s, y: lib.c_triplet_loss(x, w, y, hardest_only=True, reduction="none"),
    "sphereface2": lambda lib, x, w, s, y: lib.sphereface2_loss(x, w, y, s / 9),
    "inner_distance": lambda lib, x, w, s, y: lib.inner_distance(x, w, normalize=True),
    "inner_distance L1": lambda lib, x, w, s, y: lib.inner_distance(x, w, p=1),
    "pairs": lambda lib, x, w, s, y: lib.pair_contrastive_loss(x, w[y], y == 0, margin=9.0),
    "triplets": lambda lib, x, w, s, y: lib.triplet_loss(x, w[y], w[y - 1], margin=19.0, reduction="none"),
}


def number(f):
    return lambda *given: (f(*given) ** 2).sum() + f(*given).sum()


def stacked(t, dim=0):
    return torch.stack([t, 2 * t.sin()], dim)


def dual(f, given, along):
    with forward_mode.dual_level():
        made = f(*(forward_mode.make_dual(t, v) for t, v in zip(given, along, strict=True)))
        tangent = forward_mode.unpack_dual(made).tangent
        assert tangent is not None
        return tangent


def dual_without_grad(f, given, along):
    with torch.no_grad():
        return dual(f, given, along)


def of_dual(f, given, along):
    """Backward through forward mode."""
    x, w, _ = (t.detach().requires_grad_() for t in given)
    moved = dual(lambda x, w: number(f)(x, w, given[2]), (x, w), along[:2])
    return torch.autograd.grad(moved, (x, w), materialize_grads=True)


def of_direction(f, given, along):
    """The same numbers by backward alone: torch.logsumexp has no backward through forward mode."""
    x, w, _ = (t.detach().requires_grad_() for t in given)
    first = torch.autograd.grad(number(f)(x, w, given[2]), (x, w), create_graph=True, materialize_grads=True)
    moved = sum((g * v).sum() for g, v in zip(first, along[:2], strict=True))
    return torch.autograd.grad(moved, (x, w), materialize_grads=True)


#: name -> (function of (x, weight, scale), the three, three directions) -> what a user would look at
TRANSFORMS = {
    "grad": lambda f, g, v: grad(number(f), (0, 1, 2))(*g),
    "grad by x": lambda f, g, v: grad(number(f))(*g),
    "vjp": lambda f, g, v: vjp(f, *g)[1](f(*g).cos()),
    "jvp": lambda f, g, v: jvp(f, g, v)[1],
    "jvp by weight": lambda f, g, v: jvp(lambda w: f(g[0], w, g[2]), g[1:2], v[1:2])[1],
    "jacrev": lambda f, g, v: jacrev(f, (0, 1, 2))(*g),
    "jacfwd": lambda f, g, v: jacfwd(f, (0, 1, 2))(*g),
    "hessian": lambda f, g, v: hessian(number(f), (0, 1))(*g),
    "jacrev twice": lambda f, g, v: jacrev(jacrev(number(f)))(*g),
    "jvp of grad": lambda f, g, v: jvp(grad(number(f), (0, 1)), g, v)[1],
    "grad of jvp": lambda f, g, v: grad(lambda *t: jvp(number(f), t, v)[1], (0, 1))(*g),
    "penalty": lambda f, g, v: grad(
        lambda *t: sum(d.square().sum() for d in grad(number(f), (0, 1))(*t)), (0, 1)
    )(*g),
    "vmap": lambda f, g, v: vmap(f, (0, None, None))(stacked(g[0]), *g[1:]),
    "vmap of weights": lambda f, g, v: vmap(f, (None, 1, 0))(g[0], stacked(g[1], 1), stacked(g[2])),
    "vmap twice": lambda f, g, v: vmap(vmap(f, (0, None, None)), (None, 0, None))(
        stacked(g[0]), stacked(g[1]), g[2]
    ),
    "vmap of grad": lambda f, g, v: vmap(grad(number(f), (0, 1)), (0, None, None))(stacked(g[0]), *g[1:]),
    "grad of vmap": lambda f, g, v: grad(
        lambda x, w: vmap(number(f), (0, None, None))(x, w, g[2]).sum(), (0, 1)
    )(stacked(g[0]), g[1]),
    "dual": dual,
    "dual without grad": dual_without_grad,
    "backward of dual": of_dual,
}
#: Where plain torch does not follow.
OF_THE_REFERENCE = {**TRANSFORMS, "backward of dual": of_direction}
QUICK = {"grad", "jvp", "hessian", "vmap of grad", "dual without grad"}


def same(got, expected):
    got, expected = (t if isinstance(t, tuple) else (t,) for t in (got, expected))
    for a, b in zip(got, expected, strict=True):
        if isinstance(a, tuple):
            same(a, b)
        else:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "transform",
    [pytest.param(t, marks=() if t in QUICK else pytest.mark.slow) for t in TRANSFORMS],
)
def test_every_op_under_every_transform(lane, op, transform):
    x, w = lane.randn(BATCH, DIM, dtype=torch.float64), lane.randn(CLASSES, DIM, dtype=torch.float64, seed=1)
    given, labels = (x, w, lane.tensor(5.0, torch.float64)), LABELS.to(lane.device)
    along = x.cos(), w.sin(), given[2].cos()
    got, expected = (
        transforms[transform](lambda *t, lib=lib: OPS[op](lib, *t, labels), given, along)
        for lib, transforms in ((F, TRANSFORMS), (R, OF_THE_REFERENCE))
    )
    same(got, expected)


@pytest.mark.parametrize("op", ["rows", "c_contrastive", "sphereface2", "norm_linear", "normalize"])
def test_gradients_in_batches(lane, op):
    x, w = lane.randn(BATCH, DIM, grad=True), lane.randn(CLASSES, DIM, seed=1, grad=True)
    made = OPS[op](F, x, w, lane.tensor(5.0), LABELS.to(lane.device))
    upstream = torch.stack([made.detach().cos(), made.detach().sin()])
    (got,) = torch.autograd.grad(made, x, upstream, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(made, x, u, retain_graph=True)[0] for u in upstream]
    torch.testing.assert_close(got, torch.stack(expected))


HEADS = {
    "plain": lambda: nf.NormFaceLoss(DIM, CLASSES, scale=8.0, learn_scale=True),
    "learned margin": lambda: nf.NormFaceLoss(
        DIM, CLASSES, margin=nf.ArcFace(torch.nn.Parameter(torch.tensor(0.2)))
    ),
    "magface": lambda: nf.NormFaceLoss(DIM, CLASSES, margin=nf.MagFace()),
    "adaface": lambda: nf.NormFaceLoss(DIM, CLASSES, margin=nf.AdaFace()).eval(),
    "curricularface": lambda: nf.NormFaceLoss(DIM, CLASSES, margin=nf.CurricularFace()).eval(),
    "c_contrastive": lambda: nf.CContrastiveLoss(DIM, CLASSES),
    "c_triplet": lambda: nf.CTripletLoss(DIM, CLASSES),
    "sphereface2": lambda: nf.SphereFace2Loss(DIM, CLASSES),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_without_its_state(name):
    head, x = HEADS[name](), torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(0))
    parameters = {key: p.detach() for key, p in head.named_parameters()}

    def loss(given, x, y):
        return functional_call(head, (given, dict(head.named_buffers())), (x, y))

    got = grad(loss)(parameters, x, LABELS)
    head(x, LABELS).backward()
    for key, parameter in head.named_parameters():
        torch.testing.assert_close(got[key], parameter.grad)
    each = vmap(grad(loss), (None, 0, 0))(parameters, x[:, None], LABELS[:, None])
    for row in range(BATCH):
        head.zero_grad()
        head(x[row : row + 1], LABELS[row : row + 1]).backward()
        for key, parameter in head.named_parameters():
            torch.testing.assert_close(each[key][row], parameter.grad)


def test_an_ensemble_of_heads():
    heads = [HEADS["plain"]() for _ in range(3)]
    x = torch.randn(BATCH, DIM)
    parameters, buffers = stack_module_state(heads)
    base = copy.deepcopy(heads[0]).to("meta")
    for arguments in ((x,), (x, LABELS)):
        got = vmap(lambda p, b, given=arguments: functional_call(base, (p, b), given))(parameters, buffers)
        torch.testing.assert_close(got, torch.stack([head(*arguments) for head in heads]))


def test_what_has_no_gradient_in_batches():
    x, w = torch.randn(2, BATCH, DIM), torch.randn(CLASSES, DIM)
    for call in (
        lambda x: F.nearest_class(x, w)[0],
        lambda x: F.target_rank(x, w, LABELS),
        lambda x: F.c_triplet_stats(x, w, LABELS),
        lambda x: F.c_contrastive_stats(x, w, LABELS),
    ):
        torch.testing.assert_close(vmap(call)(x), torch.stack([call(each) for each in x]))


W, X = torch.ones(CLASSES, DIM), torch.ones(BATCH, DIM)
#: what is refused -> (the call, the error, its first words)
REFUSED = {
    "a state that would move": (
        lambda: grad(lambda x: F.normface_loss(x, W, LABELS, 4.0, margin=nf.AdaFace()))(X),
        RuntimeError,
        r"AdaFace: expected eval\(\)",
    ),
    "third derivatives": (
        lambda: grad(lambda x: hessian(lambda x: F.c_triplet_loss(x, W.cos(), LABELS))(x).sum())(X),
        RuntimeError,
        "c_triplet_loss: third derivatives",
    ),
    "forward mode twice": (
        lambda: jacfwd(jacfwd(lambda x: F.normface_loss(x, W, LABELS, 4.0)))(X),
        RuntimeError,
        "normface_loss: third derivatives, and second ones by forward mode alone",
    ),
    "values in batches": (
        lambda: vmap(lambda x: F.normface_loss(x, W, LABELS, 4.0, check_finite=True))(X[None]),
        ValueError,
        "normface_loss: expected `check_finite` False under torch.func.vmap",
    ),
    "a label out of range": (
        lambda: grad(lambda x: F.normface_loss(x, W, LABELS + CLASSES, 4.0))(X),
        IndexError,
        "normface_loss: expected `labels` in",
    ),
    "a label out of range in batches": (
        lambda: vmap(lambda y: F.normface_loss(X, W, y, 4.0))(LABELS[None] + CLASSES),
        RuntimeError,
        "expected `labels` in",
    ),
    "torch.autograd.functional's batches": (
        lambda: torch.autograd.functional.jacobian(
            lambda x: F.sphereface2_loss(x, W, LABELS, 0.1), X, vectorize=True, strategy="forward-mode"
        ),
        RuntimeError,
        "sphereface2_loss: expected no `vectorize`",
    ),
    "Caffe's own gradient": (
        lambda: grad(lambda d: nf.caffe.general_triplet_loss(d, LABELS)[0])(torch.rand(BATCH, CLASSES)),
        RuntimeError,
        "triplet_of_distances: expected no torch.func transform",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    call, error, words = REFUSED[what]
    with pytest.raises(error, match=words):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("op", ["normalize", "norm_linear", "triplets"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "penalty"])
def test_a_compiler_follows_the_ops_of_plain_torch(compile_fully, op, transform):
    x, w, s = torch.randn(BATCH, DIM), torch.randn(CLASSES, DIM), torch.tensor(5.0)

    def call(*given):
        return TRANSFORMS[transform](
            lambda *t: OPS[op](F, *t, LABELS), given, (given[0].cos(), given[1].sin(), given[2].cos())
        )

    same(compile_fully(call)(x, w, s), call(x, w, s))


@pytest.mark.slow
@pytest.mark.parametrize("op", ["loss", "c_triplet", "sphereface2", "inner_distance"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "penalty"])
def test_a_compiler_leaves_the_transforms_of_heads_to_themselves(compile_fully, op, transform):
    x, w, s = torch.randn(BATCH, DIM), torch.randn(CLASSES, DIM), torch.tensor(5.0)

    def call(*given):
        return TRANSFORMS[transform](
            lambda *t: OPS[op](F, *t, LABELS), given, (given[0].cos(), given[1].sin(), given[2].cos())
        )

    same(torch.compile(call, backend="aot_eager")(x, w, s), call(x, w, s))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compile follows no transform"):
        compile_fully(call)(x, w, s)
