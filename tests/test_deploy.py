"""Leaving PyTorch: what deployed models end with is made of torch's own operations in files and exports."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import normface_ext as nf

F = nf.functional


class Unit(nn.Module):
    """What a user writes with functions."""

    def forward(self, x):
        return F.normalize(x, p=2, eps=1e-3)


class Classifier(nn.Module):
    """A training module as it is deployed: without labels."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x)


class Predictor(Classifier):
    def forward(self, x):
        return self.head.predict(x)


def moved(layer, scale):
    """A learned scale that has left its bounds."""
    with torch.no_grad():
        layer.scale.fill_(scale)
    return layer


BOUNDS = {"learn_scale": True, "min_scale": 2.0, "max_scale": 30.0}
#: name -> a layer of features [N, 12]
LAYERS = {
    "normalize": nf.NormalizeLayer,
    "L1": lambda: nf.NormalizeLayer(p=1),
    "eps": lambda: nf.NormalizeLayer(eps=0.3),
    "no eps": lambda: nf.NormalizeLayer(eps=0.0),
    "columns": lambda: nf.NormalizeLayer(dim=0),
    "norm": lambda: nf.NormalizeLayer(return_norm=True),
    "L1 norm": lambda: nf.NormalizeLayer(dim=-1, p=1, eps=1e-3, return_norm=True),
    "function": Unit,
    "linear": lambda: nf.NormLinear(12, 7, scale=16.3),
    "weight only": lambda: nf.NormLinear(12, 7, normalize_input=False, eps=1e-3),
    "learned scale": lambda: nf.NormLinear(12, 7, scale=16.0, **BOUNDS),
    "scale below": lambda: moved(nf.NormLinear(12, 7, scale=16.0, **BOUNDS), 0.5),
    "scale above": lambda: moved(nf.NormLinear(12, 7, scale=16.0, **BOUNDS), 99.0),
    "parametrized": lambda: parametrizations.weight_norm(nf.NormLinear(12, 7, scale=4.0)),
    "head": lambda: Classifier(nf.NormFaceLoss(12, 7, margin=nf.ArcFace(0.5), learn_scale=True)),
}
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    return LAYERS[name]().to(dtype).eval()


def rows(count=6, dtype=torch.float32):
    """Of every magnitude: zeros, squares that vanish, squares that overflow, as far as the dtype goes."""
    torch.manual_seed(1)
    x = torch.randn(count, 12, dtype=torch.float64)
    most = torch.finfo(dtype).max
    for row, size in zip(x, (0.0, 1e-20, min(1e20, most / 100)), strict=False):
        row *= size
    return x.to(dtype)


def outputs(result):
    return list(result) if isinstance(result, (tuple, list)) else [result]


def assert_same(found, expected):
    """To rounding of the coarser of two dtypes: of the results, and of the computation behind them."""
    for a, b in zip(outputs(found), outputs(expected), strict=True):
        a, b = torch.as_tensor(a), b.detach()
        assert a.dtype == b.dtype and a.shape == b.shape
        finest = torch.promote_types(b.dtype, torch.float32)
        eps = max(torch.finfo(b.dtype).eps, 8 * torch.finfo(finest).eps)
        size = b.double().abs().amax().item()
        torch.testing.assert_close(a.double(), b.double(), rtol=2 * eps, atol=eps * size / 4)


# By themselves ----------------------------------------------------------------------------------------


def backbone(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.PReLU(), layer).eval()


def targets(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@every_layer
@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("strict", [False, True])
def test_exported_it_is_torchs_own_operations(name, dtype, strict):
    layer = layer_of(name, dtype)
    # The norms of columns are over the batch.
    batch = None if name == "columns" else ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(layer, (rows(dtype=dtype),), dynamic_shapes=batch, strict=strict)
    assert not [target for target in targets(program) if "normface" in target]
    for count in (6,) if batch is None else (3, 6, 9):
        x = rows(count, dtype)
        assert_same(program.module()(x), layer(x))


LOAD = """
import sys, torch
sys.modules["normface_ext"] = None
for path, kind, x, expected in torch.load("inputs.pt"):
    model = torch.export.load(path).module() if kind == "exported" else torch.jit.load(path)
    found = model(x)
    for a, b in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()), msg=f"{path} differs")
print("loaded")
"""


def test_saved_files_load_without_this_package(tmp_path):
    """Of torch.export and torch.jit.trace by themselves, of torch.jit.script after ``export_ready``."""
    given = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own about TorchScript
        for name in LAYERS:
            model, x, other = backbone(layer_of(name)), rows(), rows(4)
            ready = nf.export_ready(model)
            makers = {
                "exported": lambda path, model=model, x=x, name=name: torch.export.save(
                    torch.export.export(
                        model,
                        (x,),
                        dynamic_shapes=None if name == "columns" else ({0: torch.export.Dim("batch")},),
                    ),
                    path,
                ),
                "traced": lambda path, model=model, x=x: torch.jit.trace(model, (x,)).save(path),
                "scripted": lambda path, ready=ready: torch.jit.script(ready).save(path),
            }
            if name == "function":
                del makers["scripted"]  # it is no layer: see below
            for kind, make in makers.items():
                path = tmp_path / f"{name} {kind}.pt2"
                make(path)
                asked = x if name == "columns" and kind == "exported" else other
                expected = [t.detach() for t in outputs(model(asked))]
                given.append((path.name, kind, asked, expected))
    torch.save(given, tmp_path / "inputs.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOAD]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "loaded\n", done.stderr[-2000:]


@pytest.mark.parametrize("layer", ["head", "linear"])
def test_a_trace_within_autocast_has_its_dtype(layer):
    model, x = layer_of(layer), rows(4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        program = torch.export.export(model, (x,))
        found = program.module()(x)
    assert expected.dtype == torch.bfloat16
    assert_same(found, expected)


@pytest.mark.slow  # a C++ compiler is at work
def test_ahead_of_time_compiled(tmp_path):
    model = backbone(nf.NormalizeLayer())
    program = torch.export.export(model, (rows(),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    loaded = torch._inductor.aoti_load_package(path)
    for count in (3, 6):
        assert_same(loaded(rows(count)), model(rows(count)))


# ONNX -------------------------------------------------------------------------------------------------


def onnx_session(model, x, path, batch=True):
    shapes = ({0: torch.export.Dim("batch")},) if batch else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"} and not graph.functions
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@every_layer
@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_onnx_runtime_agrees(name, dtype, tmp_path):
    layer = layer_of(name, dtype)
    session = onnx_session(layer, rows(dtype=dtype), tmp_path / "model.onnx", name != "columns")
    (given,) = session.get_inputs()
    for count in (6,) if name == "columns" else (2, 6, 9):
        x = rows(count, dtype)
        found = [torch.from_numpy(array) for array in session.run(None, {given.name: x.numpy()})]
        expected = outputs(layer(x))
        if dtype == torch.float64:  # torch.onnx writes the numbers of a module, such as eps, in float32
            found, expected = [t.float() for t in found], [t.float() for t in expected]
        assert_same(found, expected)


def test_onnx_of_a_backbone_and_of_what_a_head_predicts(tmp_path):
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.PReLU(8), nn.Flatten())
    model = nn.Sequential(nf.MirrorFace(convolutions), nn.Linear(392, 12), nf.NormalizeLayer()).eval()
    images = torch.randn(2, 3, 16, 16)
    session = onnx_session(model, images, tmp_path / "model.onnx")
    (given,) = session.get_inputs()
    more = torch.randn(5, 3, 16, 16)
    (found,) = session.run(None, {given.name: more.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(more).detach(), rtol=1e-4, atol=1e-5)

    predictor = Predictor(nf.NormFaceLoss(12, 40)).eval()
    session = onnx_session(predictor, rows(), tmp_path / "head.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: rows(9).numpy()})
    assert torch.equal(torch.from_numpy(found), predictor(rows(9)))


def test_onnx_of_a_map_of_features(tmp_path):
    """Along the channels, and with the norm."""
    layer = nf.NormalizeLayer(return_norm=True)
    maps = torch.randn(2, 5, 3, 4)
    session = onnx_session(layer, maps, tmp_path / "model.onnx")
    maps = torch.randn(4, 5, 3, 4)
    assert_same(tuple(session.run(None, {session.get_inputs()[0].name: maps.numpy()})), layer(maps))


# export_ready -----------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("dtype", FLOATS)
def test_ready_it_has_the_same_outputs(name, dtype):
    layer = layer_of(name, dtype)
    ready = nf.export_ready(layer)
    assert not [
        m for m in ready.modules() if isinstance(m, (nf.NormalizeLayer, nf.NormLinear, nf.NormFaceLoss))
    ]
    assert_same(ready(rows(dtype=dtype)), layer(rows(dtype=dtype)))


@pytest.mark.parametrize("make", [nf.NormalizeLayer, lambda: nf.NormLinear(12, 7, scale=4.0)])
def test_ready_it_has_the_same_gradients(make):
    torch.manual_seed(0)
    layer = make()
    ready, slope = nf.export_ready(layer), torch.randn_like(layer(rows()))
    found = []
    for module in (layer, ready):
        x = rows().double().float().requires_grad_()
        found.append(torch.autograd.grad(module(x), [x, *module.parameters()], slope))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6 * float(a[3:].abs().max()))


def test_ready_it_is_a_copy_and_what_was_shared_is():
    torch.manual_seed(0)
    norm, head = nf.NormalizeLayer(), nf.NormFaceLoss(12, 7, margin=nf.AdaFace())
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(12, 12), norm), "b": norm, "head": head})
    model["tied"] = nf.NormLinear(12, 7)
    model["tied"].weight = head.weight
    model["body"] = nn.Linear(12, 7, bias=False)
    model["body"].weight = head.weight
    before = copy.deepcopy(model.state_dict())
    ready = nf.export_ready(model.train())
    assert (
        ready["a"][1] is ready["b"] and ready["head"].weight is ready["tied"].weight is ready["body"].weight
    )
    assert ready["head"].weight is not head.weight and model["b"] is norm and model["head"] is head
    assert all(m.training for m in ready.modules())
    assert not any(m.training for m in nf.export_ready(model.eval()).modules())
    with torch.no_grad():
        ready["head"].weight.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


LOSSES = {
    "contrastive": lambda: nf.CContrastiveLoss(12, 7),
    "triplet": lambda: nf.TripletLoss(),
    "sigmoid": lambda: nf.SphereFace2Loss(12, 7),
    "distance": lambda: nf.InnerDistance(12, 7),
    "recipe": lambda: nf.recipes.ProxyAnchor(12, 7),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_for_training_stays_behind(loss):
    made = LOSSES[loss]()
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(12, 12), nf.NormalizeLayer()), "loss": made})
    ready = nf.export_ready(model.eval())
    assert list(ready.state_dict()) == ["body.0.weight", "body.0.bias"] and type(made).__name__ in repr(ready)
    torch.testing.assert_close(ready["body"](rows()), model["body"](rows()))
    with pytest.raises(RuntimeError, match=f"export_ready: .* needs no {type(made).__name__}"):
        ready["loss"](rows())
    torch.jit.script(ready["body"])


def test_what_cannot_be_made_ready():
    with pytest.raises(TypeError, match="export_ready: expected `module` to be a Module, got function"):
        nf.export_ready(F.normalize)


# torch.jit.script -------------------------------------------------------------------------------------


class Written(nn.Module):
    def forward(self, x):
        return F.normalize(x)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 12))

    def forward(self, x):
        return F.norm_linear(x, self.weight)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *(
            (LAYERS[name], kind)
            for name, kind in [("normalize", "NormalizeLayer"), ("learned scale", "NormLinear")]
        ),
        (LAYERS["head"], "NormFaceLoss"),
        *((make, type(make()).__name__) for make in LOSSES.values()),
        (Written, "normalize"),
        (Linear, "norm_linear"),
    ],
)
def test_script_says_who_cannot_and_what_can(make, name):
    model = nn.Sequential(nn.Linear(12, 12), make())
    with pytest.raises(RuntimeError, match=f"{name}: expected torch.export or torch.jit.trace.*export_ready"):
        torch.jit.script(model)
    assert type(model[1]) is type(make())  # torch.jit.script puts what it prepared into the model


@pytest.mark.parametrize("merge", ["sum", "max", "concat"])
def test_a_mirror_face_is_scripted(merge):
    images = torch.randn(3, 3, 4, 4)
    model = nf.MirrorFace(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), merge)
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))


# torch.fx ---------------------------------------------------------------------------------------------


@every_layer
def test_symbolically_traced(name):
    layer = layer_of(name)
    for model in (layer, backbone(layer)):
        traced = torch.fx.symbolic_trace(model)
        for graph in (traced, copy.deepcopy(traced)):
            for count in (6, 2):
                for a, b in zip(outputs(graph(rows(count))), outputs(model(rows(count))), strict=True):
                    assert torch.equal(a, b)


def test_symbolically_traced_a_learned_scale_learns():
    layer = layer_of("learned scale")
    traced = torch.fx.symbolic_trace(backbone(layer))
    optimizer = torch.optim.SGD(traced.parameters(), 0.1)
    for _ in range(2):
        before = layer.scale.item()
        optimizer.zero_grad()
        traced(rows()).square().sum().backward()
        optimizer.step()
        assert layer.scale.item() != before


def test_symbolically_traced_a_mirror_face():
    images = torch.randn(3, 3, 4, 4)
    model = nf.MirrorFace(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), "max")
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(images), model(images))
    assert "backbone_1" in {node.name for node in traced.graph.nodes}  # for feature extractors


def test_symbolically_traced_a_loss_says_what_to_do():
    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nf.NormFaceLoss(12, 7)

        def forward(self, x, labels):
            return self.head(x, labels)

    with pytest.raises(TypeError, match=r"got Proxy of torch\.fx; a Tracer whose is_leaf_module"):
        torch.fx.symbolic_trace(Training())

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, nf.NormFaceLoss) or super().is_leaf_module(module, name)

    model, labels = Training(), torch.arange(6)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(rows(), labels), model(rows(), labels))
