"""The dense N x C form in which the papers' own code writes its heads, in plain float64 torch.

Shared by the tests of published heads: a margin is a function (cosines of the targets [N]) -> psi [N], and
everything around it is F.normalize, F.linear and F.cross_entropy. Nothing here comes from the package.
"""

import torch
import torch.nn.functional as F


def loss(
    x,
    weight,
    labels,
    scale,
    psi,
    *,
    reduction="mean",
    label_smoothing=0.0,
    class_weight=None,
    sample_weight=None,
):
    """Rows of label -100 or weight 0 are left out; psi is told only of the others, in their order."""
    weights = torch.ones(len(x), dtype=torch.float64) if sample_weight is None else sample_weight.double()
    kept = (labels != -100) & (weights != 0)
    y, rows = labels[kept], torch.arange(int(kept.sum()))
    cosine = F.linear(F.normalize(x[kept]), F.normalize(weight))
    logits = cosine.clone()
    logits[rows, y] = psi(cosine[rows, y])
    each = F.cross_entropy(
        scale * logits, y, weight=class_weight, reduction="none", label_smoothing=label_smoothing
    )
    each = each * weights[kept]
    if reduction == "none":
        return torch.zeros(len(x), dtype=each.dtype).index_put((kept.nonzero()[:, 0],), each)
    if reduction == "sum":
        return each.sum()
    of_class = 1.0 if class_weight is None else class_weight[y]
    return each.sum() / (weights[kept] * of_class).sum()


def problem(rows=9, dim=16, classes=7, dtype=torch.float64, lengths=(1.0, 60.0), seed=0):
    """Features of very different lengths near their classes, weights, labels with one row ignored."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    near = torch.linspace(-1.0, 1.5, rows, dtype=torch.float64)[:, None]  # from behind the class to beside it
    x = F.normalize(weight[labels]) * near + 0.2 * torch.randn(
        rows, dim, generator=generator, dtype=torch.float64
    )
    low, high = lengths
    x = F.normalize(x) * (low + (high - low) * torch.rand(rows, 1, generator=generator, dtype=torch.float64))
    labels[rows // 2] = -100
    return x.to(dtype), weight.to(dtype), labels


def gradients(function, *tensors):
    """[value, gradient, ...] of a function of detached copies; any shape of value."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.device))]


def assert_equal_to_1e10(found, expected):
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.cpu().double(), e, rtol=1e-10, atol=1e-10)


#: What may be asked of every head, as keywords; rows and classes as in `problem`.
OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "class_weight": {"class_weight": torch.linspace(0.5, 2, 7, dtype=torch.float64)},
    "sample_weight": {"sample_weight": torch.tensor([1.0, 0, 2, 0.5, 1, 1, 0, 3, 1], dtype=torch.float64)},
    "everything": {
        "reduction": "sum",
        "label_smoothing": 0.2,
        "class_weight": torch.linspace(2, 0.5, 7, dtype=torch.float64),
        "sample_weight": torch.tensor([1.0, 0, 2, 0.5, 1, 1, 0, 3, 1], dtype=torch.float64),
    },
}


def allowed(margin, options):
    """Without what a margin with hard negatives refuses."""
    if not getattr(margin, "hard_negatives", False):
        return options
    return {name: value for name, value in options.items() if name != "label_smoothing"}


def on(lane, options):
    return {k: lane.tensor(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def counted(labels, sample_weight=None):
    kept = labels != -100
    return kept if sample_weight is None else kept & (sample_weight != 0)
