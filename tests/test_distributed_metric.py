"""The class-parallel metric losses: real processes, against one process with all rows and all agents."""

import itertools

import pytest
import torch
from ranks import on_ranks

import normface_ext as nf
from normface_ext.distributed import metric

IGNORE = -100
DIM = 7
#: First classes of the shards and first rows of the ranks, with the ends.
LAYOUTS = {
    "even": ([0, 8, 16], [0, 6, 12]),
    "ragged": ([0, 7, 11, 17], [0, 2, 9, 13]),
    "empty shard": ([0, 9, 9, 17], [0, 5, 8, 12]),
    "no rows": ([0, 5, 17], [0, 0, 9]),
    "one class each": ([0, 1, 2, 3], [0, 3, 9, 15]),
}
CASES = {
    "contrastive": ("c_contrastive_loss", {"neg_margin": 1.9, "pos_margin": 0.1}),
    "contrastive listed": ("c_contrastive_loss", {"neg_margin": 1.9, "active_limit": 20}),
    "contrastive swept": ("c_contrastive_loss", {"neg_margin": 1.9, "active_limit": 0}),
    "contrastive none": ("c_contrastive_loss", {"neg_margin": 1.9, "reduction": "none"}),
    "contrastive hardest": ("c_contrastive_loss", {"neg_margin": 2.5, "hardest_only": True}),
    "contrastive exponential": ("c_contrastive_loss", {"neg_margin": 1.9, "exp_negative_weight": True}),
    "contrastive exponential listed": (
        "c_contrastive_loss",
        {"neg_margin": 1.9, "exp_negative_weight": True, "active_limit": 20, "reduction": "sum"},
    ),
    "contrastive batch": (
        "c_contrastive_loss",
        {"neg_margin": 2.2, "max_positive_only": True, "normalize_negative": 0.3, "positive_first": True},
    ),
    "triplet": ("c_triplet_loss", {"margin": 0.3}),
    "triplet sum": ("c_triplet_loss", {"margin": 0.3, "reduction": "sum", "add_center_loss": True}),
    "triplet none": ("c_triplet_loss", {"margin": 0.3, "reduction": "none", "active_limit": 0}),
    "triplet hardest": ("c_triplet_loss", {"margin": 0.3, "hardest_only": True}),
    "triplet hardest none": (
        "c_triplet_loss",
        {"margin": 0.3, "hardest_only": True, "reduction": "none", "positive_first": True},
    ),
}


def whole(layout, dtype, ignore=IGNORE):
    """Features near their agents, all agents, labels with an ignored row; the upstream gradient of a row."""
    classes, batch = LAYOUTS[layout][0][-1], LAYOUTS[layout][1][-1]
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    x = weight[labels] + 1.5 * torch.randn(batch, DIM, generator=generator, dtype=torch.float64)
    upstream = torch.randn(batch, generator=generator, dtype=torch.float64)
    labels[batch // 2] = ignore
    return x.to(dtype), weight.to(dtype), labels, upstream


def gradients(loss, x, weight, upstream):
    g = upstream.to(loss.dtype) if loss.dim() else torch.tensor(1.7, dtype=loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight), g)


def in_one_process(layout, name, options, dtype):
    x, weight, labels, upstream = whole(layout, dtype)
    x.requires_grad_(), weight.requires_grad_()
    loss = getattr(nf.functional, name)(x, weight, labels, **options)
    return gradients(loss, x, weight, upstream)


def shard_of(layout, rank, tensors):
    classes, rows = LAYOUTS[layout]
    x, weight, labels, upstream = tensors
    part, mine = slice(*classes[rank : rank + 2]), slice(*rows[rank : rank + 2])
    x, weight = x[mine].clone().requires_grad_(), weight[part].clone().requires_grad_()
    return x, weight, labels[mine], upstream[mine], {"first_class": part.start, "num_classes": classes[-1]}


def layouts_of(world):
    return [name for name, (classes, _) in LAYOUTS.items() if len(classes) == world + 1]


def every_case(rank, world):
    """{(layout, case, dtype): (loss, dx, dweight)} on this rank."""
    found = {}
    for layout, (case, (name, options)), dtype in itertools.product(
        layouts_of(world), CASES.items(), (torch.float32, torch.float64)
    ):
        x, weight, labels, upstream, place = shard_of(layout, rank, whole(layout, dtype))
        loss = getattr(metric, name)(x, weight, labels, **place, **options)
        found[layout, case, dtype] = [t.numpy() for t in gradients(loss, x, weight, upstream)]
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_equals_one_process(world, tmp_path):
    ranks = on_ranks(world, tmp_path, every_case, world)
    for layout, case, dtype in ranks[0]:
        (classes, rows), (name, options) = LAYOUTS[layout], CASES[case]
        expected = in_one_process(layout, name, options, dtype)
        assert all(part.abs().max() > 0 for part in expected), f"{layout}, {case} shows nothing"
        for rank, found in enumerate(ranks):
            mine, part = slice(*rows[rank : rank + 2]), slice(*classes[rank : rank + 2])
            places = mine if expected[0].dim() else ..., mine, part
            for got, all_of_it, place in zip(found[layout, case, dtype], expected, places, strict=True):
                here = all_of_it[place]
                assert got.shape == here.shape and torch.from_numpy(got).dtype == dtype
                error = (torch.from_numpy(got) - here).abs().flatten() / all_of_it.abs().max()
                allowed = 32 * torch.finfo(dtype).eps
                assert (error <= allowed).all(), f"{layout}, {case}, {dtype}, rank {rank}: {error.max():.2g}"


def sixteen_bit(rank, dtype):
    """A zero row and a zero agent among the others, and an ignored row with NaN."""
    x, weight, labels, upstream = whole("ragged", dtype)
    x[0], weight[8], labels[1], x[6] = 0, 0, 8, torch.nan
    x, weight, labels, upstream, place = shard_of("ragged", rank, (x, weight, labels, upstream))
    found = []
    for options in ({"active_limit": 0}, {"active_limit": 20}, {"hardest_only": True}):
        loss = metric.c_triplet_loss(x, weight, labels, margin=1.5, reduction="sum", **place, **options)
        found.append([t.float().numpy() for t in gradients(loss, x, weight, upstream)])
        assert loss.dtype == torch.float32 and found[-1][0] == found[-1][0]
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit(dtype, tmp_path):
    """The shards' parts of dx are added before they are rounded; float16 holds a zero row's finite."""
    x, weight, labels, upstream = whole("ragged", dtype)
    x[0], weight[8], labels[1], x[6] = 0, 0, 8, torch.nan
    x.requires_grad_(), weight.requires_grad_()
    ranks = on_ranks(3, tmp_path, sixteen_bit, dtype)
    for i, options in enumerate(({"active_limit": 0}, {"active_limit": 20}, {"hardest_only": True})):
        loss = nf.functional.c_triplet_loss(x, weight, labels, margin=1.5, reduction="sum", **options)
        loss, dx, dw = gradients(loss, x, weight, upstream)
        found = [[torch.from_numpy(array) for array in rank[i]] for rank in ranks]
        got_x, got_w = (torch.cat([rank[k] for rank in found]) for k in (1, 2))
        assert all(rank[0] == pytest.approx(float(loss), rel=1e-6) for rank in found)
        assert got_x.isfinite().all() and got_w.isfinite().all() and got_x[0].abs().max() > 1e4
        assert (got_x[0].abs().max() == 65504) == (dtype == torch.float16)
        assert torch.allclose(got_x, dx.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert torch.allclose(got_w, dw.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def corners(rank):
    """What depends on ranks, errors among it; each by its name."""
    found = {}
    # Three negatives at the same distance, in three shards: the first shard's class counts.
    place = {"first_class": 2 * rank, "num_classes": 6}
    agents = torch.eye(8)[[7, 1, 2, 3, 4, 5]][2 * rank : 2 * rank + 2].requires_grad_()
    x = torch.eye(8)[:1].requires_grad_() if rank == 1 else torch.zeros(0, 8, requires_grad=True)
    loss = metric.c_triplet_loss(x, agents, torch.zeros(len(x), dtype=torch.int64), margin=1.0,
                                 hardest_only=True, **place)  # fmt: skip
    found["ties"] = loss.item(), torch.autograd.grad(loss, agents)[0].abs().sum(1).tolist()

    x, weight, labels, _, place = shard_of("ragged", rank, whole("ragged", torch.float32))
    for name, options in (("c_contrastive_loss", {"neg_margin": 2.0}), ("c_triplet_loss", {})):
        for hardest in (False, True):
            with torch.no_grad():
                poisoned = x.clone()
                if rank == 1:
                    poisoned[3] = torch.nan
                given = {**options, "hardest_only": hardest, "reduction": "none"}
                losses = getattr(metric, name)(poisoned, weight, labels, **place, **given)
            found["nan", name, hardest] = losses.isnan().tolist()

    def said(**changed):
        arguments = {"x": x, "weight": weight, "labels": labels, **place, **changed}
        try:
            metric.c_triplet_loss(**arguments)
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    bad = labels.clone()
    if rank == 2:
        bad[0] = 17
    found["label"] = said(labels=bad)
    found["gap"] = said(weight=weight[: 1 if rank == 0 else 100])
    found["overlap"] = said(first_class=max(0, place["first_class"] - 1))
    found["outside"] = said(first_class=place["first_class"] + 100)
    found["classes"] = said(num_classes=0)
    found["labels"] = said(labels=labels[:0])
    found["shape"] = said(weight=weight[:, :3])
    loss = metric.c_contrastive_loss(x, weight, labels, neg_margin=2.0, **place)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    try:
        dx.sum().backward()
    except RuntimeError as error:
        found["second"] = str(error)
    return found


def test_corners(tmp_path):
    ranks = on_ranks(3, tmp_path, corners)
    # d = 2 for every negative, target at 2 as well: one hinge of 1, from class 1, and the label's pull.
    assert [rank["ties"][0] for rank in ranks] == [1.0, 1.0, 1.0]
    assert [[size > 0 for size in rank["ties"][1]] for rank in ranks] == [
        [True, True],
        [False, False],
        [False, False],
    ]
    for key in ranks[0]:
        if key[0] == "nan":
            assert [rank[key] for rank in ranks] == [[False] * 2, [i == 3 for i in range(7)], [False] * 4]
    for rank in ranks:
        assert rank["label"] == (
            "IndexError: c_triplet_loss: expected `labels` in [0, 17) or ignore_index (-100), got 17 at row 9"
        )
        assert rank["gap"].startswith("ValueError: c_triplet_loss: expected the shards to have 17 classes")
        assert rank["overlap"].startswith("ValueError: c_triplet_loss: expected `labels` in [0, 17) or")
        assert rank["overlap"].endswith("and every class in one shard")
        assert rank["outside"].startswith("ValueError: c_triplet_loss: expected `first_class` in [0, ")
        assert rank["classes"] == "ValueError: c_triplet_loss: expected `num_classes` >= 1, got 0"
        assert rank["labels"].startswith("ValueError: c_triplet_loss: expected `labels` to have shape")
        assert rank["shape"].startswith("ValueError: c_triplet_loss: expected `weight` to be [C, 7]")
        assert rank["second"].startswith("c_contrastive_loss: second derivatives are not available")
