"""The files of a checkpoint: what is saved, what a damaged or foreign one is told, what a crash leaves."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal

import distributed_jobs as jobs
import numpy as np
import pytest
import torch
from ranks import ranks
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load

import normface_ext as nf
from normface_ext.distributed import RowAdamW, RowSGD, checkpoints, load_checkpoint, save_checkpoint, storage
from normface_ext.distributed.manifest import Manifest, _of_content, checksum

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def make(classes=60, features=16, *, name="head", kind=RowSGD, dtype=None, seed=0, **options):
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict({name: nf.NormFaceLoss(features, classes, dtype=dtype)})
    return model, kind(model.parameters(), lr=0.1, **options)


def step(model, optimizer):
    (head,) = model.values()
    head(torch.randn(4, head.in_features, dtype=head.weight.dtype), torch.arange(4)).backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(folder, number=1, *, extra=None, keep=2, **options):
    model, optimizer = make(momentum=0.9, **options)
    step(model, optimizer)
    return save_checkpoint(folder, number, model, optimizer, extra=extra, keep=keep), model, optimizer


def contents(model, optimizer):
    tensors = [*model.state_dict().values()]
    return tensors + [t for state in optimizer.state.values() for t in state.values()]


def refused(folder, given, *names, extra=None, errors=(ValueError, OSError)):
    """The sentence that loading into `given` raises; nothing may have changed."""
    nf.distributed.checkpoint._optimizers(given[1])
    get_state_dict(*given)  # the zeros that an optimizer begins with are made by the call itself
    before = [t.clone() for t in contents(*given)]
    known = dict(extra or {})
    with pytest.raises(errors) as raised:
        load_checkpoint(folder, *given, extra=extra)
    said = str(raised.value)
    assert all(torch.equal(a, b) for a, b in zip(contents(*given), before, strict=True))
    assert extra is None or extra == known
    assert all(name in said for name in names), said
    assert len(said.replace(str(folder), "")) <= 300, said
    return said


# What is saved --------------------------------------------------------------------------------------


def test_plain_values_and_tensors_come_back(tmp_path):
    plain = {"epoch": 3, "rate": 0.5, "rng": torch.get_rng_state(), "names": ["a"], "none": None}
    plain["nested"] = {"x": (1, None), "y": {"z": b"bytes"}, "list": [torch.ones(2), 5]}
    saved(tmp_path, extra=plain)
    back = {**dict.fromkeys(plain), "rng": torch.zeros_like(plain["rng"])}
    back["nested"] = {"x": 0, "y": {"z": 0}, "list": [torch.zeros(2), 0]}
    assert load_checkpoint(tmp_path, *make(momentum=0.9), extra=back) == 1
    assert torch.equal(back.pop("rng"), plain.pop("rng"))
    assert torch.equal(back["nested"]["list"].pop(0), plain["nested"]["list"].pop(0))
    assert back == plain


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"a": object()}, "object in extra.a"),
        ({"a": {"b": np.float64(1)}}, "float64 in extra.a.b"),
        ({"a": [1, np.ones(2)]}, "list in extra.a"),
        ({"a": print}, "builtin_function_or_method in extra.a"),
        ({"a": {"b": {3: 4}}}, "the keys of `extra.a.b` to be strings, got int 3"),
    ],
)
def test_what_would_need_code_is_not_saved(tmp_path, extra, named):
    with pytest.raises(TypeError, match=f"save_checkpoint: expected .*{re.escape(named)}"):
        saved(tmp_path, extra=extra)
    assert not list(tmp_path.iterdir())


def test_an_option_that_needs_code_is_not_saved(tmp_path):
    model, optimizer = make()
    optimizer.param_groups[0]["lr"] = np.float64(0.1)
    with pytest.raises(TypeError, match=r"got float64 in optimizers\.param_groups\.0\.lr"):
        save_checkpoint(tmp_path, 1, model, optimizer)


def test_options_of_the_optimizer_come_back(tmp_path):
    model, optimizer = make(momentum=0.9)
    optimizer.param_groups[0].update(lr=0.03, weight_decay=0.5)
    save_checkpoint(tmp_path, 1, model, optimizer)
    given = make(momentum=0.9)
    load_checkpoint(tmp_path, *given)
    assert given[1].param_groups[0]["lr"] == 0.03 and given[1].param_groups[0]["weight_decay"] == 0.5


def test_the_libraries_own_tools_read_it(tmp_path):
    path, model, _ = saved(tmp_path, extra={"epoch": 2})
    state = {"model": {"head.weight": torch.zeros(60, 16)}, "extra": {"epoch": None}}
    load(state, checkpoint_id=path)
    assert torch.equal(state["model"]["head.weight"], model["head"].weight) and state["extra"]["epoch"] == 2


# Damage and malice ----------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def rewritten(path, change):
    """The manifest after `change(content)`, its own checksum right again: what a forger can do."""
    content = json.loads((path / "manifest.json").read_text())["content"]
    change(content)
    (path / "manifest.json").write_text(json.dumps({"checksum": _of_content(content), "content": content}))


@pytest.mark.parametrize("name", ["extra.epoch", "model.head.weight", ".metadata"])
@pytest.mark.parametrize("forged", [False, True])
def test_no_code_of_a_checkpoint_runs(tmp_path, name, forged):
    path, *_ = saved(tmp_path, extra={"epoch": 2})
    mark = tmp_path / "executed"
    shard = path / "__0_0.distcp"
    if name == ".metadata":
        (path / name).write_bytes(pickle.dumps(Bomb(mark)))
        if forged:
            rewritten(path, lambda content: content.update(metadata=checksum(path / ".metadata")))
            assert load_checkpoint(tmp_path, *make(momentum=0.9)) == 1  # it is not read at all
            assert not mark.exists()
            return
    else:
        start = shard.stat().st_size
        with open(shard, "ab") as file:
            torch.save(Bomb(mark), file)
        length = shard.stat().st_size - start

        def change(content):
            (part,) = content["entries"][name]["parts"]
            part.update(start=start, length=length)
            if forged:
                part["checksum"] = checksum(shard, start, length)

        rewritten(path, change)
    refused(tmp_path, make(momentum=0.9, seed=1), "step-1", extra={"epoch": 0}, errors=ValueError)
    assert not mark.exists()


def test_every_flipped_bit_is_found(tmp_path):
    path, *_ = saved(tmp_path, extra={"epoch": 2})
    chosen, given = random.Random(0), make(momentum=0.9, seed=1)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for place in [0, len(good) - 1, *(chosen.randrange(len(good)) for _ in range(8))]:
            data = bytearray(good)
            data[place] ^= 1 << chosen.randrange(8)
            file.write_bytes(data)
            refused(tmp_path, given, "step-1", extra={"epoch": 0})
        file.write_bytes(good)
    assert load_checkpoint(tmp_path, *given) == 1


def test_a_flipped_bit_names_its_tensor(tmp_path):
    path, model, _ = saved(tmp_path)
    shard = path / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[data.index(model["head"].weight.detach().numpy().tobytes())] ^= 1
    shard.write_bytes(data)
    refused(tmp_path, make(momentum=0.9), str(shard), "model.head.weight", "rank 0", errors=ValueError)


@pytest.mark.parametrize("file", [".metadata", "manifest.json", "__0_0.distcp"])
def test_cut_and_lost_files_are_named(tmp_path, file):
    path, *_ = saved(tmp_path)
    good, given = (path / file).read_bytes(), make(momentum=0.9, seed=1)
    for size in (0, 100, len(good) // 2, len(good) - 1):
        (path / file).write_bytes(good[:size])
        refused(tmp_path, given, str(path / file), errors=ValueError)
    (path / file).unlink()
    refused(tmp_path, given, str(path / file), errors=FileNotFoundError)


def test_files_and_folders_of_other_checkpoints_are_found(tmp_path):
    first, *_ = saved(tmp_path, 1)
    second, *_ = saved(tmp_path, 2, seed=3)
    given = make(momentum=0.9, seed=1)
    own = (second / "__0_0.distcp").read_bytes()
    shutil.copy(first / "__0_0.distcp", second)
    refused(tmp_path, given, "step-2", "__0_0.distcp", errors=ValueError)
    (second / "__0_0.distcp").write_bytes(own)
    shutil.copytree(second, tmp_path / "step-7")
    refused(tmp_path, given, "expected step 7", "got 2", errors=ValueError)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["entries"]["model.head.weight"]["parts"][0].update(file="../../secret"),
        lambda c: c["entries"]["model.head.weight"]["parts"].clear(),
        lambda c: c["entries"]["model.head.weight"]["parts"][0].update(size=[59, 16]),
        lambda c: c["entries"]["model.head.weight"]["parts"][0].update(offset=None),
        lambda c: c["entries"]["model.head.weight"].update(dtype="load"),
        lambda c: c["entries"]["model.head.weight"].update(dtype="float64"),
        lambda c: c["entries"]["model.head.weight"]["parts"][0].update(start=-5),
        lambda c: c["entries"]["model.head.weight"]["parts"][0].update(start="0"),
        lambda c: c["entries"]["model.head.weight"]["parts"][0].update(length=1 << 80),
        lambda c: c["entries"].update({"model.head.weight": 5}),
        lambda c: c.pop("entries"),
        lambda c: c.update(step=None),
    ],
)
def test_a_forged_manifest_is_refused(tmp_path, change):
    path, *_ = saved(tmp_path)
    rewritten(path, change)
    refused(tmp_path, make(momentum=0.9, seed=1), "step-1")


@pytest.mark.parametrize("text", ["", "[" * 100_000, "null", "[]", '{"content": {}, "checksum": ""}', "\xff"])
def test_no_manifest_at_all_is_refused(tmp_path, text):
    path, *_ = saved(tmp_path)
    (path / "manifest.json").write_text(text, encoding="latin-1")
    refused(tmp_path, make(momentum=0.9, seed=1), "manifest.json", errors=ValueError)


# Checkpoints of other runs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"classes": 61}, ["model.head.weight", "[61, 16]", "[60, 16]"]),
        ({"features": 17}, ["model.head.weight", "[60, 17]", "[60, 16]"]),
        ({"dtype": torch.float64}, ["model.head.weight", "float64", "float32"]),
        ({"kind": RowAdamW, "momentum": None}, ["exp_avg", "momentum_buffer", "lost"]),
        ({"name": "tail"}, ["model.tail.weight", "head.weight", "lost"]),
        ({"momentum": 0.0}, ["momentum_buffer", "lost"]),
    ],
)
def test_checkpoints_of_other_runs_are_refused(tmp_path, options, named):
    saved(tmp_path)
    wanted = {key: value for key, value in {"momentum": 0.9, **options}.items() if value is not None}
    refused(tmp_path, make(seed=1, **wanted), "step-1", *named, errors=ValueError)


@pytest.mark.parametrize("kind", [RowSGD, torch.optim.SGD])
def test_missing_momentum_is_named(tmp_path, kind):
    save_checkpoint(tmp_path, 1, *make(momentum=0.0))
    refused(tmp_path, make(momentum=0.9, kind=kind, seed=1), "with no optimizers.state.head.weight.momentum")


def test_groups_of_other_parameters_are_refused(tmp_path):
    def both(order):
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
        groups = [{"params": model[name].parameters()} for name in order]
        return model, RowSGD(groups)

    save_checkpoint(tmp_path, 1, *both("ab"))
    assert load_checkpoint(tmp_path, *both("ab")) == 1
    refused(tmp_path, both("ba"), "group 0 of the optimizers", "step-1", errors=ValueError)


def test_extra_of_another_kind_is_refused(tmp_path):
    saved(tmp_path, extra={"epoch": 2, "rng": torch.zeros(3)})
    given = make(momentum=0.9, seed=1)
    refused(tmp_path, given, "with no extra.age", extra={"age": 1})
    refused(tmp_path, given, "extra.rng to be a plain value, got float32 [3]", extra={"rng": None})
    refused(
        tmp_path, given, "extra.rng to be a plain value, got float32 [3]", extra={"epoch": 1, "rng": None}
    )
    assert load_checkpoint(tmp_path, *given, extra={"epoch": 0}) == 1


# Numbers that are not finite ------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("mask", torch.full((4,), -torch.inf))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["layer.weight", "momentum_buffer of layer.bias", "mean"])
def test_a_run_that_has_gone_wrong_keeps_its_last_good_checkpoint(tmp_path, where, value):
    model = Net()
    optimizer = RowSGD(model.parameters(), lr=0.1, momentum=0.9)
    save_checkpoint(tmp_path, 1, model, optimizer, keep=1)
    tensors = {
        "layer.weight": model.layer.weight,
        "momentum_buffer of layer.bias": optimizer.state[model.layer.bias]["momentum_buffer"],
        "mean": model.mean,
    }
    with torch.no_grad():
        tensors[where].view(-1)[2] = value
    if where == "mean" and value == value:
        save_checkpoint(tmp_path, 2, model, optimizer, keep=1)  # infinity may mean something in a buffer
        return
    with pytest.raises(ValueError, match=f"save_checkpoint: expected finite values, got .* in {where}"):
        save_checkpoint(tmp_path, 2, model, optimizer, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    save_checkpoint(tmp_path, 2, model, optimizer, keep=1, check_finite=False)
    assert load_checkpoint(tmp_path, model, optimizer) == 2


# Crashes and full disks -----------------------------------------------------------------------------


class Killed(BaseException):
    """No handler of an Exception sees it, as none sees a kill."""


@pytest.mark.parametrize("again", [1, 2])
def test_a_crash_between_any_two_renames_leaves_a_whole_checkpoint(tmp_path, monkeypatch, again):
    """A step with keep=1 is saved, then that or the next one, up to every rename."""
    for renames in range(8):
        folder = tmp_path / str(renames)
        saved(folder, 1, keep=1)
        left = renames

        def counted(call):
            def inner(*paths, **options):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return call(*paths, **options)

            return inner

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", counted(os.rename))
            patch.setattr(os, "replace", counted(os.replace))
            try:
                saved(folder, again, keep=1, seed=5)
            except Killed:
                left = -1
        given = make(momentum=0.9, seed=9)
        assert load_checkpoint(folder, *given) in (1, again)
        assert any(torch.equal(given[0]["head"].weight, saved_one) for saved_one in both_weights())
        saved(folder, 3, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-3"]
        if left >= 0:
            break
    assert renames >= 3


def both_weights():
    for seed in (0, 5):
        model, optimizer = make(momentum=0.9, seed=seed)
        step(model, optimizer)
        yield model["head"].weight


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path):
    path, model, optimizer = saved(tmp_path, classes=1500, features=64, keep=1)
    before, limits = model["head"].weight.detach().clone(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 << 10, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"save_checkpoint: writing .*saving-2/__0_0.distcp failed"
        ) as raised:
            save_checkpoint(tmp_path, 2, model, optimizer, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG and "rank 0" in str(raised.value)
    assert list(tmp_path.iterdir()) == [path], "the rest of a draft fills the disk"
    assert load_checkpoint(tmp_path, model, optimizer) == 1
    assert torch.equal(model["head"].weight, before)


def test_a_manifest_that_can_not_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    saved(tmp_path, keep=1)

    def write(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "manifest.json"))

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", write)
        with pytest.raises(OSError, match=r"No space left on device: .*manifest.json \(rank 0\)"):
            saved(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_ctrl_c_while_saving_is_ctrl_c(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.FileSystemWriter, "write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path)
    assert checkpoints(tmp_path) == []


def test_a_step_may_be_a_numpy_integer(tmp_path):
    saved(tmp_path, np.int64(4))
    assert load_checkpoint(tmp_path, *make(momentum=0.9)) == 4


@pytest.mark.parametrize("number", [1.0, True, "1", None])
def test_a_step_is_an_int(tmp_path, number):
    with pytest.raises(TypeError, match="save_checkpoint: expected `step` to be an int, got"):
        saved(tmp_path, number)


@pytest.mark.slow
def test_ranks_without_classes_save_and_load(tmp_path):
    arguments = str(tmp_path), 5, 8
    losses, _ = ranks(4).run(jobs.trained_and_saved, *arguments, 0, 3, 2, 1.0)[0]  # 2, 2, 1 and no classes
    for world in (2, 4):
        again, _ = ranks(world).run(jobs.trained_and_saved, *arguments, 2, 3, None, 1.0)[0]
        assert again == pytest.approx(losses[2:], rel=1e-4)


def test_what_goes_wrong_on_one_rank_is_heard_on_all(tmp_path):
    heard = ranks(2).run(jobs.checkpoint_troubles, str(tmp_path))
    for said in heard:
        assert "No space left on device" in said["disk"] and "__1_0.distcp" in said["disk"]
        assert "(rank 1)" in said["disk"]
        assert "NaN or infinity in head.weight" in said["nan"] and "(rank 1)" in said["nan"]
        assert "__1_0.distcp" in said["damage"] and "model.head.weight" in said["damage"]
        assert "(rank 1)" in said["damage"]
        assert said["unchanged"] and said["steps"] == [1]
