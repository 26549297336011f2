"""examples/train_distributed.py as users start it: under torchrun, with a crash, and alone."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load

import normface_ext as nf

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_distributed.py"
CRASHING = Path(__file__).with_name("crashing_training.py")
SMALL = ["--identities", "301", "--batch", "64", "--device", "cpu"]


def torchrun(script, processes, *options, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "--max-restarts", str(restarts), str(script)]
    # Otherwise a restarted gloo may read the address of a process of the attempt before.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    ran = subprocess.run(
        [*command, *SMALL, *map(str, options)], capture_output=True, text=True, cwd="/", env=environment
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def losses(folder):
    with open(folder / "loss.csv") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


@pytest.mark.slow
def test_it_learns_and_any_number_of_processes_gives_the_same_run(tmp_path):
    said = torchrun(EXAMPLE, 2, "--steps", 80, "--out", tmp_path / "two")
    two = losses(tmp_path / "two")
    assert two[79] < 0.6 * two[0]
    auc = float(said.split("unseen identities: ")[1].split()[0])
    assert auc > 0.9, said
    alone = [sys.executable, EXAMPLE, *SMALL, "--steps", "6", "--out", tmp_path / "one"]
    subprocess.run(alone, check=True, capture_output=True, cwd="/")
    one = losses(tmp_path / "one")
    assert [one[k] for k in range(6)] == pytest.approx([two[k] for k in range(6)], rel=1e-3)


@pytest.mark.slow
def test_a_process_that_dies_is_restarted_from_the_checkpoint(tmp_path):
    options = ["--steps", 10, "--save-every", 5, "--sample-rate", 0.5, "--timeout", 60]
    torchrun(EXAMPLE, 2, *options, "--out", tmp_path / "whole")
    kept = ["--checkpoints", tmp_path / "kept"]
    said = torchrun(CRASHING, 2, *options, *kept, "--out", tmp_path / "crashed", restarts=2)
    assert "from the beginning" in said and "from the checkpoint of step 5" in said
    whole, crashed = losses(tmp_path / "whole"), losses(tmp_path / "crashed")
    assert sorted(crashed) == [5, 6, 7, 8, 9]
    assert [crashed[k] for k in crashed] == pytest.approx([whole[k] for k in crashed], rel=1e-4)
    again = torchrun(EXAMPLE, 1, *options, *kept, "--out", tmp_path / "again")
    assert "from the checkpoint of step 10" in again and "nothing left to do" in again


def test_mixed_precision_and_accumulation_run(tmp_path):
    said = torchrun(EXAMPLE, 2, "--steps", 4, "--accumulate", 2, "--amp", "bf16", "--out", tmp_path)
    assert "verification AUC" in said


@pytest.mark.slow
def test_the_loss_scale_is_part_of_a_checkpoint(tmp_path):
    options = ["--amp", "fp16", "--save-every", 2, "--checkpoints", tmp_path, "--out", tmp_path]
    torchrun(EXAMPLE, 1, *options, "--steps", 2)
    said = torchrun(EXAMPLE, 2, *options, "--steps", 4)
    assert "from the checkpoint of step 2" in said
    state = {"extra": {"scale": 0.0, "_growth_tracker": 0}}
    load(state, checkpoint_id=tmp_path / "step-4")
    assert state["extra"] == {"scale": 2.0**12, "_growth_tracker": 4}


@pytest.mark.skipif(
    not (torch.cuda.is_available() and nf.build_info()["cuda_loaded"]),
    reason="no GPU, or the CUDA kernels are not loaded",
)
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_gpus_over_nccl_give_the_cpu_run(tmp_path, rate):
    options = ["--steps", 6, "--sample-rate", rate]
    torchrun(EXAMPLE, 1, *options, "--out", tmp_path / "cpu")
    gpus = ["--device", "cuda", "--out", tmp_path / "gpu"]
    torchrun(EXAMPLE, torch.cuda.device_count(), *options, *gpus)
    cpu, gpu = losses(tmp_path / "cpu"), losses(tmp_path / "gpu")
    assert [gpu[k] for k in range(6)] == pytest.approx([cpu[k] for k in range(6)], rel=2e-3)
