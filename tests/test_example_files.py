"""Strange folders and files of torch.save for the examples: a sentence with the name, and nothing is run."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import finetune_faces as ff
import images
import numpy as np
import pytest
import torch
import torch_files
from fuzz.readers import assert_contract
from PIL import Image
from torch import nn

# Folders

#: A run of one step that ends with a checkpoint.
ONE_STEP = [
    "--size", "16", "--epochs", "2", "--batch", "4", "--device", "cpu", "--pairs", "6", "--stop-after", "1",
    "--holdout", "0.5",
]  # fmt: skip


def people(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_names_that_are_no_utf8_are_listed_like_others(tmp_path, capfd):
    folder = people(tmp_path / "faces", "a", "b", "c", "d")
    os.rename(folder / "d", os.fsencode(folder) + b"/d\xe9")
    for name in (b"/a/caf\xe9.txt", b"/a/\xff.png", b"/\xe9.txt"):
        with open(os.fsencode(folder) + name, "wb"):
            pass
    assert ff.main([str(folder), *ONE_STEP, "--out", str(tmp_path / "out")]) is None
    rows = (tmp_path / "out" / "skipped.csv").read_text(encoding="utf-8")
    assert "caf\\xe9.txt,not an image by its name" in rows
    assert '\\xff.png,"unreadable: expected an image' in rows
    assert "caf\\xe9.txt" in capfd.readouterr().out
    assert ff.main([str(folder), *ONE_STEP, "--out", str(tmp_path / "out"), "--resume"]) is None
    assert "d\\xe9" in images.scan(folder, 16).people


def test_folders_that_may_not_be_read(tmp_path, monkeypatch):
    folder, listed = people(tmp_path / "faces", "a", "b", "c"), Path.iterdir

    def guarded(path: Path):
        if path.name == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", guarded)
    closed = "b"
    found = images.scan(folder, 16)
    assert list(found.people) == ["a", "c"]
    assert found.skipped == [(str(folder / "b"), "person left out: Permission denied")]
    closed = "faces"
    with pytest.raises(SystemExit, match=r"faces: expected a folder of people, got Permission denied"):
        images.scan(folder, 16)


# Files of torch.save


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def changed(**entries: object) -> dict[str, object]:
    return {**network().state_dict(), **{name.replace("__", "."): value for name, value in entries.items()}}


def without(name: str) -> dict[str, object]:
    return {key: value for key, value in network().state_dict().items() if key != name}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("state", "part"),
    [
        (torch.zeros(3), "expected a state_dict, got Tensor"),
        ([1], "expected a state_dict, got list"),
        ({1: torch.zeros(3)}, "expected a state_dict"),
        (without("0.bias"), "has no '0.bias'"),
        (changed(other=torch.zeros(1)), "has an unknown 'other'"),
        (changed(**{"n" * 1000: torch.zeros(1)}), "has an unknown"),
        (changed(**{"0__weight": torch.zeros(2, 4)}), "'0.weight' of shape [2, 3], got [2, 4]"),
        (changed(**{"0__weight": torch.zeros(3, 2)}), "of shape [2, 3], got [3, 2]"),
        (changed(**{"0__weight": 3.0}), "dense tensor, got float"),
        (changed(**{"0__weight": torch.zeros(2, 3).to_sparse()}), "dense tensor"),
        (changed(**{"0__weight": torch.zeros(2, 3, dtype=torch.complex64)}), "torch.complex64"),
        (changed(**{"0__weight": torch.zeros(2, 3, dtype=torch.int64)}), "torch.int64"),
        (changed(**{"0__weight": torch.full((2, 3), 1e300, dtype=torch.float64)}), "finite as torch.float32"),
        (changed(**{"0__bias": torch.tensor([0.0, float("nan")])}), "'0.bias' to be finite"),
        (changed(**{"1__num_batches_tracked": torch.tensor(1.5)}), "of torch.int64, got torch.float32"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_weights_that_do_not_fit_change_nothing(tmp_path, state, part, zipped):
    path, module = tmp_path / "my_weights.pt", network()
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    error = assert_contract(lambda path: torch_files.load_weights(module, path), path)
    assert isinstance(error, ValueError) and part in str(error), error
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_weights_that_fit(tmp_path):
    path, module = tmp_path / "my_weights.pt", network()
    for zipped in (True, False):
        torch.save(
            changed(**{"0__weight": torch.ones(2, 3).half()}), path, _use_new_zipfile_serialization=zipped
        )
        assert assert_contract(lambda path: torch_files.load_weights(module, path), path) is None
        assert (module[0].weight == 1).all() and module[0].weight.dtype == torch.float32


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(tmp_path, zipped):
    path = tmp_path / "my_weights.pt"
    torch.save({"a": Bomb(tmp_path / "made")}, path, _use_new_zipfile_serialization=zipped)
    error = assert_contract(torch_files.read, path)
    assert isinstance(error, ValueError) and "weights_only" not in str(error)
    assert not (tmp_path / "made").exists()


def rewritten(path: Path, compression: int = zipfile.ZIP_STORED, twice: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(path) as given, zipfile.ZipFile(out, "w", compression) as made:
        for name in given.namelist() * (1 + twice):
            made.writestr(name, given.read(name))
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("checksums", [True, False])
def test_a_changed_bit_and_packed_entries_are_found(tmp_path, checksums):
    path = tmp_path / "good.pt"
    torch.save({"w": torch.arange(50_000.0)}, path)
    good, broken = path.read_bytes(), tmp_path / "broken.pt"
    files = [good[:-1], good[: len(good) // 2], good[:10], rewritten(path, zipfile.ZIP_DEFLATED)]
    files.append(rewritten(path, twice=True))
    for place in np.random.default_rng(0).integers(1000, len(good) - 2000, 20):
        files.append(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
    for data in files:
        broken.write_bytes(data)
        error = assert_contract(lambda path: torch_files.read(path, checksums=checksums), broken)
        assert isinstance(error, ValueError) and "broken.pt" in str(error), error
    broken.write_bytes(rewritten(path))
    assert torch_files.read(broken, checksums=checksums)["w"][-1] == 49_999


# Through the program


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a run that was stopped after its first step."""
    root = tmp_path_factory.mktemp("run")
    arguments = [str(people(root / "faces", "a", "b", "c", "d")), *ONE_STEP, "--out", str(root / "out")]
    assert ff.main(arguments) is None
    return arguments


def with_groups(state: dict, **entries: object) -> dict:
    optimizer = state["optimizer"]
    return {**optimizer, "param_groups": [{**group, **entries} for group in optimizer["param_groups"]]}


CHANGES = {
    "another file": lambda state: {"weight": torch.zeros(3)},
    "no dict": lambda state: [state],
    "an entry less": lambda state: {k: v for k, v in state.items() if k != "rng"},
    "no fingerprint": lambda state: {**state, "fingerprint": 3},
    "fingerprint of tensors": lambda state: {
        **state,
        "fingerprint": dict.fromkeys(state["fingerprint"], torch.zeros(2)),
    },
    "step": lambda state: {**state, "step": 2},
    "step of another kind": lambda state: {**state, "step": True},
    "losses": lambda state: {**state, "losses": ["x"]},
    "before": lambda state: {**state, "before": {}},
    "before of another kind": lambda state: {**state, "before": dict.fromkeys(state["before"], "x")},
    "rng that is none": lambda state: {**state, "rng": torch.full_like(state["rng"], 255)},
    "rng": lambda state: {**state, "rng": torch.zeros(3, dtype=torch.uint8)},
    "cuda": lambda state: {**state, "cuda_rng": 3},
    "backbone": lambda state: {**state, "backbone": {}},
    "head": lambda state: {**state, "head": {"weight": torch.zeros(1)}},
    "optimizer": lambda state: {**state, "optimizer": {"state": {}}},
    "groups": lambda state: {**state, "optimizer": {"state": {}, "param_groups": [{}]}},
    "groups of tensors": lambda state: {**state, "optimizer": with_groups(state, params=[torch.zeros(2)])},
    "groups with a rate of text": lambda state: {**state, "optimizer": with_groups(state, lr="x")},
    "momentum": lambda state: {
        **state,
        "optimizer": {**state["optimizer"], "state": {0: {"momentum_buffer": torch.zeros(2)}}},
    },
    "momentum of nobody": lambda state: {
        **state,
        "optimizer": {**state["optimizer"], "state": {10_000: {"momentum_buffer": torch.zeros(2)}}},
    },
    "cut": None,
    "empty": None,
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_checkpoint_that_does_not_fit_is_named(started, change):
    path = Path(started[-1]) / "checkpoint.pt"
    good = path.read_bytes()
    try:
        if CHANGES[change]:
            torch.save(CHANGES[change](torch.load(path, weights_only=True)), path)
        else:
            path.write_bytes(good[: len(good) // 2] if change == "cut" else b"")
        with pytest.raises(SystemExit, match=r"--resume: .*checkpoint\.pt") as error:
            ff.main([*started, "--resume"])
        assert len(str(error.value)) <= 300 and "weights_only" not in str(error.value)
    finally:
        path.write_bytes(good)


def test_weights_are_named(started, tmp_path):
    for data in (b"", b"PK\3\4", None):
        if data is None:
            torch.save({}, tmp_path / "my_weights.pt")
        else:
            (tmp_path / "my_weights.pt").write_bytes(data)
        with pytest.raises(SystemExit, match=r"--weights: .*my_weights\.pt"):
            ff.main([*started, "--weights", str(tmp_path / "my_weights.pt")])
    with pytest.raises(SystemExit, match=r"--weights: .*gone\.pt"):
        ff.main([*started, "--weights", str(tmp_path / "gone.pt")])
