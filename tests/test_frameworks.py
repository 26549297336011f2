"""In other people's frameworks: what docs/frameworks.md says, and what it says of all margins.

tests/test_docs.py runs the page's blocks; here is what takes several processes, a torchvision, or all kinds.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import test_docs
import torch
import torch.distributed as dist
from input_kinds import made, margins
from torch.utils.checkpoint import checkpoint

import normface_ext as nf

ROOT = Path(__file__).parents[1]
VALUES = {
    "CosFace": lambda: nf.CosFace(0.25),
    "ArcFace": lambda: nf.ArcFace(0.4, guard="none"),
    "CombinedMargin": lambda: nf.CombinedMargin(0.9, 0.4, 0.15),
    "RowMargin": lambda: nf.RowMargin(m2=0.5),
}
MARGINS = {**VALUES, **{name: lambda kind=kind: made(kind) for name, kind in margins().items()}}
every_value = pytest.mark.parametrize("margin", VALUES.values(), ids=VALUES)
every_margin = pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)


# Margins as hyper-parameters ------------------------------------------------------------------------


@every_margin
def test_a_margin_in_a_checkpoint_loads_with_weights_only(margin):
    file, given = io.BytesIO(), margin()
    torch.save({"hyper_parameters": {"margin": given}}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["hyper_parameters"]["margin"]
    assert type(loaded) is type(given) and repr(loaded) == repr(given)
    x, labels, losses = torch.randn(9, 6), torch.arange(9), []
    for each in (given, loaded):
        torch.manual_seed(0)
        losses.append(nf.NormFaceLoss(6, 9, scale=16.0, margin=each)(x, labels).detach())
    assert torch.equal(*losses)


@pytest.mark.parametrize(("name", "value"), [("m", "much"), ("m", -1.0), ("t_alpha", 2.0), ("sync", "maybe")])
def test_what_a_file_says_of_a_margin_is_checked(name, value):
    file, margin = io.BytesIO(), nf.AdaFace()
    vars(margin)[name] = value
    torch.save(margin, file)
    file.seek(0)
    with pytest.raises((TypeError, ValueError), match=f"AdaFace: expected `{name}`"):
        torch.load(file, weights_only=True)


@every_value
def test_a_value_takes_what_it_holds_and_nothing_else(margin):
    """Lightning's apply_to_collection sets every field of a copy to what it has."""
    given = margin()
    for field in dataclasses.fields(given):
        held = getattr(given, field.name)
        setattr(given, field.name, held)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(given, field.name, 0.125)
        assert getattr(given, field.name) is held
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.other = 1.0


@every_value
def test_a_value_is_a_structured_config(margin):
    from omegaconf import OmegaConf

    config = OmegaConf.structured(margin())
    assert OmegaConf.to_object(config) == margin()
    with pytest.raises(TypeError, match=r"^NormFaceLoss: expected `margin` .* got DictConfig; hydra\.utils"):
        nf.NormFaceLoss(6, 9, margin=config)
    with pytest.raises(TypeError, match=r"^NormFaceLoss: expected `margin` .* got dict; hydra\.utils"):
        nf.NormFaceLoss(6, 9, margin={"m": 0.5})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@every_margin
def test_lightning_logs_saves_and_resumes(margin, tmp_path):
    import lightning

    class Recogniser(lightning.LightningModule):
        def __init__(self, margin):
            super().__init__()
            self.save_hyperparameters()
            self.head = nf.NormFaceLoss(6, 9, margin=margin, learn_scale=True)

        def training_step(self, batch, index):
            return self.head(*batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trainer(epochs):
        logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return lightning.Trainer(accelerator="cpu", logger=logger, max_epochs=epochs, **quiet), logger

    data = torch.utils.data.TensorDataset(torch.randn(16, 6), torch.randint(9, (16,)))
    batches = torch.utils.data.DataLoader(data, 8)
    model = Recogniser(margin())
    run, logger = trainer(1)
    run.fit(model, batches)
    assert "margin" in (Path(logger.log_dir) / "hparams.yaml").read_text()
    run.save_checkpoint(tmp_path / "half.ckpt")
    again = Recogniser.load_from_checkpoint(tmp_path / "half.ckpt")
    assert repr(again.head.margin) == repr(model.head.margin)
    assert torch.equal(again.head.weight, model.head.weight)
    trainer(2)[0].fit(again, batches, ckpt_path=tmp_path / "half.ckpt")
    assert not torch.equal(again.head.weight, model.head.weight)


# Several processes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_ddp_and_fsdp2_train_as_one_process(tmp_path):
    """examples/data_parallel.py as users start it."""
    states = {}
    for name, processes, options in (("one", 1, []), ("ddp", 2, []), ("fsdp", 2, ["--fsdp"])):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), str(ROOT / "examples" / "data_parallel.py")]
        command += ["--steps", "12", "--out", str(tmp_path / name), *options]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "step 0: loss" in ran.stdout
        states[name] = torch.load(tmp_path / name, weights_only=True)
    assert {"head.weight", "head.scale", "backbone.0.weight"} <= states["one"].keys()
    assert states["one"]["head.scale"] != 16
    for name in ("ddp", "fsdp"):
        assert states[name].keys() == states["one"].keys()
        for key, value in states["one"].items():
            torch.testing.assert_close(states[name][key], value, msg=f"{name}: {key}")


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_the_rows_that_fsdp2_keeps_are_renormalized(mesh):
    from torch.distributed.fsdp import fully_shard

    head = nf.NormFaceLoss(6, 9)
    with torch.no_grad():
        head.weight.mul_(3)
    fully_shard(head, mesh=mesh)
    head.renormalize_()
    torch.testing.assert_close(head.weight.full_tensor().norm(dim=1), torch.ones(9))


@pytest.mark.parametrize("reentrant", [True, False])
def test_partial_fc_is_run_again_with_its_draw(mesh, reentrant):
    """Loss, gradients and the sampler's step of a run without torch.utils.checkpoint, over several steps; two
    forward passes before their backward passes, too."""
    torch.manual_seed(0)
    first = nf.NormFaceLoss(6, 40, scale=16.0)
    batches = [(torch.randn(8, 6), torch.randint(40, (8,))) for _ in range(4)]
    results = []
    for way in ("plain", "checkpoint"):
        head = nf.distributed.shard_head(copy.deepcopy(first), mesh, sample_rate=0.3, seed=5)
        found = []
        for pair in (batches[:2], batches[2:]):
            inputs = [x.clone().requires_grad_() for x, _ in pair]
            losses = [
                head(x, labels) if way == "plain" else checkpoint(head, x, labels, use_reentrant=reentrant)
                for x, (_, labels) in zip(inputs, pair, strict=True)
            ]
            for loss in reversed(losses):
                loss.backward()
            found += [*(loss.detach() for loss in losses), *(x.grad for x in inputs)]
        found += [head.weight.grad.to_dense(), head.sampler.step.clone()]
        results.append(found)
    assert results[0][-1] == 4
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_a_draw_that_cannot_be_told_apart_is_refused(mesh):
    head = nf.distributed.shard_head(nf.NormFaceLoss(6, 40), mesh, sample_rate=0.3)
    x = torch.randn(4, 6, requires_grad=True)

    def block(x):
        return head(x, torch.tensor([0, 1, 2, 3]))

    with pytest.raises(RuntimeError, match="ClassSampler: expected `labels` to be those of one forward pass"):
        checkpoint(block, x, use_reentrant=True).backward()


# timm -----------------------------------------------------------------------------------------------

#: timm needs a torchvision, which has to fit the torch at hand; so no extra can ask for it. Where it is not
#: installed, this variable names a folder that has both, as in continuous integration.
TIMM = os.environ.get("NORMFACE_TIMM")
PRELUDE = """
from unittest import mock
import torch
# Beside a CPU torch the library of PyPI's torchvision does not load: its ops do not exist, and have no fakes.
with mock.patch("torch.library.register_fake", lambda *given, **named: lambda kernel: kernel):
    import torchvision
torch.manual_seed(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not TIMM and find_spec("timm") is None, reason="no timm, and NORMFACE_TIMM is not set")
def test_the_page_s_timm_backbone(tmp_path):
    page = test_docs.PAGES["docs/frameworks.md"]
    (block,) = (b for b in test_docs.blocks("frameworks.md", page) if b.title == "timm_backbone.py")
    (tmp_path / "run.py").write_text(PRELUDE + block.text)
    path = os.pathsep.join(filter(None, [TIMM, os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, "run.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert ran.returncode == 0, ran.stderr
