"""torch.compile of every family: one graph however the batch varies, whole steps, autocast, schedules."""

from __future__ import annotations

import copy
import warnings

import compile_jobs
import pytest
import torch
from ranks import ranks
from torch import nn

import normface_ext as nf

CLASSES = 20
COUNTS = [1 + 3 * j for j in range(CLASSES)]


def head(**options):
    return lambda: nf.NormFaceLoss(12, CLASSES, scale=9.0, **options)


#: name -> what makes a layer
LAYERS = {
    "normalize": nf.NormalizeLayer,
    "normalize with norm": lambda: nf.NormalizeLayer(p=1, return_norm=True),
    "norm_linear": lambda: nf.NormLinear(12, CLASSES, scale=3.0, learn_scale=True),
    "logits": head(),
    "head": head(),
    "head, learned scale": head(learn_scale=True),
    "head, smoothing": head(label_smoothing=0.1, class_weight=torch.rand(CLASSES) + 0.5),
    "head, filter": head(filter_threshold=0.3, reduction="sum"),
    "CosFace": head(margin=nf.CosFace(0.3)),
    "ArcFace": head(margin=nf.ArcFace(0.3), margin_gradient="straight"),
    "CombinedMargin": head(margin=nf.CombinedMargin(1.0, 0.2, 0.1)),
    "learned margin": head(margin=nf.CosFace(nn.Parameter(torch.full((CLASSES,), 0.2)))),
    "AdaFace": head(margin=nf.AdaFace()),
    "MagFace": head(margin=nf.MagFace()),
    "ElasticArcFace": head(margin=nf.ElasticArcFace(0.3, 0.0)),
    "CurricularFace": head(margin=nf.CurricularFace()),
    "MVSoftmax": head(margin=nf.MVSoftmax(0.3, kind="arc")),
    "Circle": head(margin=nf.CircleSoftmax()),
    "SphereFace": head(margin=nf.SphereFace(), normalize_input=False),
    "sub-centres": head(margin=nf.ArcFace(0.3), sub_centers=3),
    "SphereFace2": lambda: nf.SphereFace2Loss(12, CLASSES),
    "C-contrastive": lambda: nf.CContrastiveLoss(12, CLASSES),
    "C-contrastive, running mean": lambda: nf.CContrastiveLoss(12, CLASSES, add_intra_mae=True),
    "C-triplet": lambda: nf.CTripletLoss(12, CLASSES),
    "InnerDistance": lambda: nf.InnerDistance(12, CLASSES),
    "InnerDistance, L1": lambda: nf.InnerDistance(12, CLASSES, p=1, normalize=True),
    "pairs": nf.PairContrastiveLoss,
    "triplets": nf.TripletLoss,
    "AdaCos": lambda: nf.recipes.AdaCos(12, CLASSES),
    "KappaFace": head(margin=nf.recipes.KappaFace(COUNTS, 12)),
    "LDAM": lambda: nf.recipes.LDAM(12, CLASSES, COUNTS),
    "NormSoftmax": lambda: nf.recipes.NormSoftmax(12, CLASSES),
    "P2SGrad": lambda: nf.recipes.P2SGrad(12, CLASSES),
    "ProxyAnchor": lambda: nf.recipes.ProxyAnchor(12, CLASSES),
    "ProxyNCA": lambda: nf.recipes.ProxyNCA(12, CLASSES),
    "SoftTriple": lambda: nf.recipes.SoftTriple(12, CLASSES, centers=2),
    "UniFace": lambda: nf.recipes.UniFace(12, CLASSES),
}
FEATURES_ALONE = (
    "normalize",
    "normalize with norm",
    "norm_linear",
    "logits",
    "InnerDistance",
    "InnerDistance, L1",
)
QUICK = ("normalize", "head", "AdaFace", "CurricularFace", "C-contrastive, running mean", "InnerDistance")
every_layer = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]
)


class Model(nn.Module):
    """A backbone, and what a layer makes of its features: one number."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.body, self.layer = name, nn.Linear(12, 12), LAYERS[name]()

    def forward(self, x, labels):
        x = self.body(x)
        if self.name in FEATURES_ALONE:
            out = self.layer(x)
        elif self.name == "pairs":
            out = self.layer(x, x.roll(1, 0), labels == labels.roll(1))
        elif self.name == "triplets":
            out = self.layer(x, x.roll(1, 0), x.roll(2, 0))
        else:
            out = self.layer(x, labels)
        return sum(part.float().square().sum() for part in (out if isinstance(out, tuple) else (out,)))


def batch(count, seed=0):
    made = torch.Generator().manual_seed(seed + count)
    return torch.randn(count, 12, generator=made), torch.randint(CLASSES, (count,), generator=made)


def compiled(model, **options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(model, fullgraph=True, backend="aot_eager", **options)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def train(model, step, counts=(8, 5, 11, 6, 9)):
    """The losses of a training; `step` is the model or what was compiled of it."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    found = []
    for count in counts:
        optimizer.zero_grad()
        loss = step(*batch(count))
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def assert_same_training(model, **options):
    """As eager, in losses and in what is left; the graphs that it took."""
    torch.manual_seed(0)
    other = copy.deepcopy(model)
    expected = train(model, model)
    torch.testing.assert_close(train(other, compiled(other, **options)), expected, rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(dict(other.named_buffers()), dict(model.named_buffers()))
    return graphs()


@every_layer
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_batches_of_any_size_have_one_graph(name, dynamic):
    """By default the first size has one of its own, and the second makes the one for all others."""
    assert assert_same_training(Model(name), dynamic=dynamic) == (1 if dynamic else 2)


class Mixed(Model):
    """With second labels, and a lam for each step, a number as NumPy draws it."""

    def forward(self, x, labels, lam=0.0):
        return self.layer(self.body(x), labels, labels_b=labels.roll(1), lam=lam)


class Watched(Model):
    """With what a step says of itself."""

    def forward(self, x, labels):
        loss, now = self.layer(self.body(x), labels, return_statistics=True)
        return loss + now.target_angle + now.accuracy + now.rows


@pytest.mark.parametrize(
    "name",
    ["head", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sub-centres", "Circle", "C-triplet"))],
)
def test_what_else_a_head_takes_and_gives_has_one_graph_too(name):
    assert assert_same_training(Mixed(name)) == 2
    assert assert_same_training(Watched(name)) == 2


@pytest.mark.parametrize("name", ["head", "SphereFace2"])
def test_a_lam_that_is_drawn_makes_no_graph_for_every_step(name):
    model = Mixed(name)
    step = compiled(model)
    for lam in (0.3, 0.45, 0.9, 1.0, 0.0):
        torch.testing.assert_close(step(*batch(8), lam), model(*batch(8), lam))
    assert graphs() == 2


@pytest.mark.parametrize("name", ["norm_linear", "head, learned scale", "C-triplet"])
def test_a_step_within_autocast(name):
    """Autocast outside of what is compiled, and inside."""

    class Lowered(Model):
        def forward(self, x, labels):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x, labels)

    eager, outside, inside = Lowered(name), Model(name), Lowered(name)
    expected = train(eager, eager, (8, 5))
    step = compiled(outside)

    def lowered(*given):
        with torch.autocast("cpu", torch.bfloat16):
            return step(*given)

    torch.testing.assert_close(train(outside, lowered, (8, 5)), expected)
    torch.testing.assert_close(train(inside, compiled(inside), (8, 5)), expected)


@pytest.mark.parametrize("name", ["CosFace", "logits"])
def test_a_scale_that_is_set_makes_no_graph_for_every_step(name):
    """It is an input of the graph from its second value on."""
    model = Model(name)
    step, (x, labels) = compiled(model), batch(8)
    for number in range(6):
        model.layer.scale = 4.0 + 1.3 * number
        torch.testing.assert_close(step(x, labels), model(x, labels))
    assert graphs() <= 2


def test_a_margin_that_is_a_tensor_is_set_in_place():
    model, size = Model("head"), torch.tensor(0.1)
    model.layer.margin = nf.CosFace(size)
    step, (x, labels) = compiled(model), batch(8)
    found = []
    for number in range(6):
        model.layer.margin_m.fill_(0.1 + 0.03 * number)
        found.append(step(x, labels))
        torch.testing.assert_close(found[-1], model(x, labels))
    assert graphs() == 1 and found[0] < found[-1]


def test_it_runs_our_ops():
    """And not what an export has in their place."""
    names = []

    def backend(graph, inputs):
        found = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        names.extend(str(node.target) for module in found for node in module.graph.nodes)
        return graph

    torch._dynamo.reset()
    x, layers = torch.randn(4, 12), nn.Sequential(nf.NormalizeLayer(), nf.NormLinear(12, 5))
    torch.export.export(layers, (x,))
    step = torch.compile(layers, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(step(x), layers(x))
    assert [name for name in names if name.startswith("normface_ext.")] == [
        "normface_ext.normalize",
        "normface_ext.norm_linear",
    ]


@pytest.mark.slow  # a C++ compiler is at work
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("name", ["normalize", "head", "C-contrastive"])
def test_by_the_compiler_that_is_torchs_default(name, mode):
    model = Model(name)
    other = copy.deepcopy(model)
    expected = train(model, model, (8, 5))
    torch._dynamo.reset()
    step = torch.compile(other, fullgraph=True, mode=mode)
    torch.testing.assert_close(train(other, step, (8, 5)), expected, rtol=1e-5, atol=1e-6)


@every_layer
def test_an_exported_loss_takes_any_batch(name):
    """In eval mode, in which nothing moves."""
    model = Model(name).eval()
    size = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, batch(8), dynamic_shapes=({0: size}, {0: size})).module()
    for count in (5, 11):
        torch.testing.assert_close(program(*batch(count)), model(*batch(count)))


@every_layer
def test_a_loss_can_be_drawn(name):
    """As SummaryWriter.add_graph does: torch.jit.trace compares what it gets with and without gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about sizes that are numbers in a trace
        torch.jit.trace(Model(name), batch(8))


@pytest.mark.parametrize(
    "kind", ["head", *(pytest.param(k, marks=pytest.mark.slow) for k in ("C-contrastive", "SphereFace2"))]
)
def test_a_class_parallel_head_is_one_graph(kind):
    for eager, whole in ranks(2).run(compile_jobs.step, kind, True):
        for a, b in zip(eager, whole, strict=True):
            torch.testing.assert_close(b, a)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", ["head", "learned scale with a bound"])
def test_a_class_parallel_head_whose_scale_and_batches_change(kind, dynamic):
    for eager, whole in ranks(2).run(compile_jobs.training, kind, dynamic):
        torch.testing.assert_close(whole, eager)


@pytest.mark.parametrize("kind", ["learned scale", "long features"])
def test_a_class_parallel_head_that_reads_its_scales_says_so(kind):
    for said in ranks(2).run(compile_jobs.step, kind, True):
        assert "fullgraph=True, or a bound on it, max_scale of a head" in said


def test_a_class_parallel_head_that_asks_for_batch_sizes_says_so():
    for said in ranks(2).run(compile_jobs.step, "head", False):
        assert "expected torch.compile without fullgraph=True, or a head with equal_batches=True" in said
