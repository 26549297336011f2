"""AdaFace against the formula of its released code, and what becomes of its running statistics."""

import math

import dense_head
import pytest
import torch
from dense_head import OPTIONS, assert_equal_to_1e10, counted, gradients, on, problem
from ranks import ranks

import normface_ext as nf

M, H, ALPHA = 0.4, 0.333, 0.05
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Released:
    """The authors' AdaFace head: statistics and margin, as its forward writes them; `straight` as CVLface."""

    def __init__(self, straight=False):
        self.mean, self.std, self.straight = (
            torch.tensor(20.0).double(),
            torch.tensor(100.0).double(),
            straight,
        )

    def psi(self, norms):
        safe_norms = norms.detach().clip(min=0.001, max=100)
        self.mean = safe_norms.mean() * ALPHA + (1 - ALPHA) * self.mean
        self.std = safe_norms.std() * ALPHA + (1 - ALPHA) * self.std
        scaler = ((safe_norms - self.mean) / (self.std + 1e-3) * H).clip(-1, 1)
        g_angular, g_add = -M * scaler, M + M * scaler

        def exact(cosine):
            theta = cosine.clamp(-1 + 1e-3, 1 - 1e-3).acos()
            return (theta + g_angular).clip(1e-3, math.pi - 1e-3).cos() - g_add

        def written_over(cosine):
            with torch.no_grad():
                target = (cosine.clamp(-1, 1).acos() + g_angular).cos() - g_add
            return cosine + (target - cosine).detach()

        return written_over if self.straight else exact


def of_the_released(released, labels, scale, options):
    kept = counted(labels, options.get("sample_weight"))
    return lambda x, w: dense_head.loss(x, w, labels, scale, released.psi(x[kept].norm(dim=1)), **options)


@pytest.mark.covering(2)
@pytest.mark.parametrize("gradient", ["exact", "straight"])
@every_option
def test_it_is_the_released_code(lane, options, gradient):
    """Over steps, so that the state is followed too; the last rows meet all three clamps."""
    head, released = nf.AdaFace(M, H, ALPHA, device=lane.device), Released(gradient == "straight")
    for step in range(3):
        x, weight, labels = problem(lengths=(1.0, 60.0 * (1 + step)), seed=step)
        expected = gradients(of_the_released(released, labels, 16.0, options), x, weight)
        found = gradients(
            lambda x, w, y=labels: nf.functional.normface_loss(
                x, w, lane.tensor(y), 16.0, margin=head, margin_gradient=gradient, **on(lane, options)
            ),
            lane.tensor(x),
            lane.tensor(weight),
        )
        assert_equal_to_1e10(found, expected)
        assert_equal_to_1e10([head.mean[0], head.std[0]], [released.mean, released.std])


def test_the_clamps_are_met():
    """What the test above relies on: a cosine past 0.999, and angles past both ends."""
    head = nf.AdaFace(M, h=100.0).eval()
    weight = torch.eye(2, dtype=torch.float64)
    x = torch.tensor([[99.0, 0.1], [99.0, 20.0], [-1.0, 0.1]], dtype=torch.float64, requires_grad=True)
    loss = nf.functional.normface_loss(x, weight, torch.zeros(3).long(), 8.0, margin=head, reduction="none")
    psi = [1 - 5e-7, math.cos(1e-3) - 2 * M, math.cos(math.pi - 1e-3)]
    others = x.detach()[:, 1] / x.detach().norm(dim=1)
    for row, value in ((1, psi[1]), (2, psi[2])):
        expected = math.log1p(math.exp(8.0 * (others[row] - value)))
        assert abs(float(loss[row].detach()) - expected) < 1e-9
        # No slope in the target: all that is left of the gradient is the other class's.
        (dx,) = torch.autograd.grad(loss[row], x, retain_graph=True)
        q, n, x_hat = -math.expm1(-expected), x.detach()[row].norm(), x.detach()[row] / x.detach()[row].norm()
        slope = 8.0 * q * (weight[1] - others[row] * x_hat) / n
        torch.testing.assert_close(dx[row], slope, rtol=1e-9, atol=1e-12)


def test_no_gradient_through_the_norm(lane):
    x, weight, labels = (lane.tensor(t) for t in problem())
    x.requires_grad_()
    nf.functional.normface_loss(x, weight, labels, 16.0, margin=nf.AdaFace(device=lane.device)).backward()
    assert x.grad.abs().sum() > 0
    torch.testing.assert_close((x.grad * x.detach()).sum(1), x.new_zeros(len(x)), atol=1e-12, rtol=0)


# State -----------------------------------------------------------------------------------------------


def step(margin, norms, labels=None, **options):
    """One forward of features with these norms."""
    x = torch.zeros(len(norms), 3, dtype=torch.float64)
    x[:, 0] = torch.tensor(norms)
    labels = torch.zeros(len(norms)).long() if labels is None else torch.tensor(labels)
    weight = torch.eye(3, dtype=torch.float64)
    return nf.functional.normface_loss(x, weight, labels, 16.0, margin=margin, **options)


def state(margin):
    return float(margin.mean), float(margin.std)


def test_the_first_step():
    margin = nf.AdaFace(t_alpha=0.25)
    assert state(margin) == (20.0, 100.0)
    step(margin, [10.0, 14.0])
    assert state(margin) == pytest.approx((0.25 * 12 + 15, 0.25 * math.sqrt(8) + 75))


def test_rows_that_do_not_count_take_no_part():
    margin, alone = nf.AdaFace(t_alpha=0.25), nf.AdaFace(t_alpha=0.25)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    step(margin, [10.0, math.nan, 14.0, math.inf], [0, -100, 1, 2], sample_weight=weights)
    step(alone, [10.0, 14.0], [0, 1])
    assert state(margin) == state(alone)


def test_one_row_leaves_the_deviation_and_none_leaves_both():
    margin = nf.AdaFace(t_alpha=0.25)
    assert step(margin, [10.0]).isfinite()
    assert state(margin) == (pytest.approx(17.5), 100.0)
    assert step(margin, [10.0, 12.0], [-100, -100]) == 0
    assert step(margin, []) == 0
    assert state(margin) == (pytest.approx(17.5), 100.0)


def test_norms_are_held_in_their_range():
    margin = nf.AdaFace(t_alpha=1.0)
    step(margin, [0.0, 500.0])
    assert state(margin) == pytest.approx((50.0005, math.sqrt(2) * 49.9995))


def test_eval_moves_nothing():
    margin = nf.AdaFace().eval()
    step(margin, [10.0, 14.0])
    assert state(margin) == (20.0, 100.0)
    head = nf.NormFaceLoss(3, 3, margin=nf.AdaFace()).eval()
    head(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert state(head.margin) == (20.0, 100.0)


def test_a_mean_kept_from_zero_to_one():
    frozen = nf.AdaFace(t_alpha=0.0)
    step(frozen, [10.0, 14.0])
    assert state(frozen) == (20.0, 100.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_features(lane, dtype):
    """The state is as wide as ever, and the margin is that of the rounded features."""
    x, weight, labels = problem(dtype=dtype)
    head, released = nf.AdaFace(M, H, ALPHA, device=lane.device), Released()
    expected = gradients(of_the_released(released, labels, 16.0, {}), x.double(), weight.double())
    found = gradients(
        lambda x, w: nf.functional.normface_loss(x, w, lane.tensor(labels), 16.0, margin=head),
        lane.tensor(x),
        lane.tensor(weight),
    )
    assert head.mean.dtype == head.std.dtype == torch.float64
    torch.testing.assert_close(head.mean[0].cpu(), released.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(head.std[0].cpu(), released.std, rtol=1e-6, atol=0)
    assert [found[0].dtype, found[1].dtype, found[2].dtype] == [torch.float32, dtype, dtype]
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for f, e in zip(found, expected, strict=True):
        assert (f.cpu().double() - e).norm() <= tolerance * e.norm()


def test_all_ranks_have_one_state_if_asked():
    """Rank r has rows of its own, and one of them none; the whole batch on one process is the measure."""
    import batch_margin_jobs

    local, together = (ranks(3).run(batch_margin_jobs.adaface_state, sync) for sync in ("local", "global"))
    whole = nf.AdaFace(t_alpha=0.25)
    step(whole, batch_margin_jobs.NORMS[0] + batch_margin_jobs.NORMS[1] + batch_margin_jobs.NORMS[2])
    for found in together:
        assert found == pytest.approx(state(whole), rel=1e-14)
    alone = nf.AdaFace(t_alpha=0.25)
    step(alone, batch_margin_jobs.NORMS[0])
    assert local[0] == state(alone) and local[2] == (20.0, 100.0)


def test_sync_without_a_process_group_is_local():
    margin, local = nf.AdaFace(sync="global"), nf.AdaFace()
    step(margin, [10.0, 14.0])
    step(local, [10.0, 14.0])
    assert state(margin) == state(local)


# Sentences -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, error, sentence",
    [
        ({"m": -0.1}, ValueError, r"AdaFace: expected `m` in \[0, 3.14159\), got -0.1"),
        ({"m": "0.4"}, TypeError, r"AdaFace: expected `m` to be a number, got str"),
        ({"h": -1}, ValueError, r"AdaFace: expected `h` to be finite and >= 0, got -1"),
        ({"t_alpha": 1.5}, ValueError, r"AdaFace: expected `t_alpha` in \[0, 1\], got 1.5"),
        ({"sync": "all"}, ValueError, r"AdaFace: expected `sync` to be one of local, global, got 'all'"),
    ],
)
def test_bad_arguments(given, error, sentence):
    with pytest.raises(error, match=sentence):
        nf.AdaFace(**given)


def test_a_state_on_the_meta_device():
    sentence = (
        r"normface_loss: expected `margin` to have a state, got AdaFace\(.*\) on the meta device; to_empty"
    )
    with pytest.raises(ValueError, match=sentence):
        step(nf.AdaFace(device="meta"), [10.0, 14.0])


def test_the_state_follows_the_features(lane):
    margin = nf.AdaFace()  # on the CPU
    x, weight, labels = (lane.tensor(t) for t in problem())
    nf.functional.normface_loss(x, weight, labels, 16.0, margin=margin)
    assert margin.mean.device.type == x.device.type and float(margin.mean) != 20.0
