"""examples/finetune_faces.py on a tiny folder of made-up faces: exact resume, reports, export."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import finetune_faces as ff
import numpy as np
import pytest
import torch
from PIL import Image

SIZE = 24


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 people, 6 images each: a fixed coloured pattern per person plus noise."""
    root = tmp_path_factory.mktemp("faces")
    random = np.random.default_rng(0)
    for person in range(8):
        (root / f"person_{person}").mkdir()
        pattern = random.integers(0, 256, (4, 4, 3)).repeat(SIZE // 4, 0).repeat(SIZE // 4, 1)
        for image in range(6):
            pixels = (pattern + random.normal(0, 40, pattern.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"person_{person}" / f"{image}.png")
    return root


BACKBONE = """
from torch import nn
def make():  # dropout draws from the random state, batch norm keeps averages: both must survive a resume
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                         nn.Dropout(0.3), nn.Linear(8 * 11 * 11, 16))
def scalar():
    return nn.Sequential(nn.Flatten(0), nn.LazyLinear(1))
"""


@pytest.fixture
def arguments(faces: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "net.py").write_text(BACKBONE)
    options = {
        "--backbone": f"{tmp_path / 'net.py'}:make", "--size": SIZE, "--epochs": 4, "--batch": 8,
        "--lr": 0.01, "--head-lr": 10, "--holdout": 0.4, "--pairs": 40, "--device": "cpu", "--save-every": 3,
    }  # fmt: skip
    return [str(faces), *(str(word) for pair in options.items() for word in pair)]


def checkpoint(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same_bits(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.covering(0)
@pytest.mark.parametrize("stops", [[7], [3, 1, 6]])
def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(arguments, tmp_path, stops):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = ff.main([*arguments, "--out", str(whole)])
    resume: list[str] = []
    for stop in stops:  # 4 batches an epoch: in the middle of epochs and at their ends
        assert ff.main([*arguments, "--out", str(parts), "--stop-after", str(stop), *resume]) is None
        assert checkpoint(parts)["step"] < checkpoint(whole)["step"] == 16
        torch.manual_seed(12345)  # another process would start from another state
        resume = ["--resume"]
    resumed = ff.main([*arguments, "--out", str(parts), "--resume"])
    a, b = checkpoint(whole), checkpoint(parts)
    assert same_bits(a, b), [key for key in a if not same_bits(a[key], b[key])]
    assert resumed == result
    assert (whole / "metrics.csv").read_text() == (parts / "metrics.csv").read_text()
    # The comparison can fail: another seed gives other bits.
    ff.main([*arguments, "--out", str(tmp_path / "other"), "--seed", "1"])
    assert not same_bits(checkpoint(tmp_path / "other")["backbone"], a["backbone"])


@pytest.mark.slow
def test_a_killed_process_resumes_from_its_last_checkpoint(arguments, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ff.main([*arguments, "--out", str(whole)])
    # os._exit while step 8 is being saved: the part file is written, the checkpoint is that of step 6.
    program = """
import os, sys
sys.path.insert(0, sys.argv[1])
import finetune_faces as ff
real = os.replace
calls = []
def replace(*paths):
    calls.append(paths)
    if len(calls) == 3:
        os._exit(9)
    real(*paths)
os.replace = replace
ff.main(sys.argv[2:])
"""
    examples = str(Path(ff.__file__).parent)
    command = [sys.executable, "-c", program, examples, *arguments, "--out", str(parts)]
    # Results repeat bit by bit for one number of threads, and other tests may have changed it here.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 9, done.stderr
    assert checkpoint(parts)["step"] == 6
    ff.main([*arguments, "--out", str(parts), "--resume"])
    assert same_bits(checkpoint(parts), checkpoint(whole))


@pytest.mark.slow
def test_training_learns_and_what_is_deployed_is_what_was_measured(arguments, faces, tmp_path, capsys):
    out = tmp_path / "out"
    result = ff.main([*arguments, "--out", str(out), "--epochs", "12"])
    losses = checkpoint(out)["losses"]
    assert np.mean(losses[-4:]) < 0.2 * np.mean(losses[:4])
    assert result["accuracy"] > 0.8
    printed = capsys.readouterr().out
    assert f"after   accuracy {result['accuracy']:.2%}" in printed
    assert "embedder.pt2: its output is the unit-length embedding" in printed

    assert (out / "training.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    about = json.loads((out / "embedder.json").read_text())
    assert about["threshold"] == result["threshold"]
    assert about["mirror_summed"]
    # In a Python that never imports normface_ext.
    image = faces / "person_0" / "0.png"
    program = f"""
import sys, numpy, torch
from PIL import Image
pixels = torch.from_numpy(numpy.array(Image.open({str(image)!r}))).permute(2, 0, 1)[None]
unit = torch.export.load({str(out / "embedder.pt2")!r}).module()(pixels)
assert "normface_ext" not in sys.modules
print(*unit[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    deployed = np.array([float(word) for word in done.stdout.split()])
    # By hand: the backbone's features of image and mirror image, summed, divided by their length.
    backbone = ff.make_backbone(f"{tmp_path / 'net.py'}:make", None)
    backbone.load_state_dict(checkpoint(out)["backbone"])
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        images = (pixels - 127.5) / 128
        features = backbone.eval()(images) + backbone(images.flip(-1))
    truth = (features / features.norm())[0].numpy()
    np.testing.assert_allclose(deployed, truth, atol=2e-6)
    assert np.abs(truth - (backbone(images) / backbone(images).norm())[0].detach().numpy()).max() > 1e-3


def test_bad_files_are_reported_and_left_out(arguments, faces, tmp_path, capsys):
    folder = tmp_path / "faces"
    for source in sorted(faces.glob("*/*.png")):
        target = folder / source.parent.name / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    whole = (folder / "person_1" / "0.png").read_bytes()
    (folder / "person_1" / "0.png").write_bytes(whole[: len(whole) // 2])  # truncated
    (folder / "person_2" / "0.png").write_bytes(b"")
    (folder / "person_3" / "notes.txt").write_text("hello")
    (folder / "readme.md").write_text("hello")
    (folder / "alone").mkdir()
    (folder / "alone" / "1.png").write_bytes(whole)
    (folder / "nobody").mkdir()
    assert ff.main([str(folder), *arguments[1:], "--out", str(tmp_path / "out"), "--epochs", "1"]) is not None
    with (tmp_path / "out" / "skipped.csv").open() as file:
        skipped = {
            Path(row["path"]).relative_to(folder).as_posix(): row["reason"] for row in csv.DictReader(file)
        }
    assert set(skipped) == {
        "person_1/0.png", "person_2/0.png", "person_3/notes.txt", "readme.md", "alone", "nobody",
    }  # fmt: skip
    assert skipped["person_1/0.png"].startswith("unreadable: ")
    assert skipped["alone"] == "person left out: only one image, and a pair needs two"
    assert skipped["nobody"] == "person left out: no readable image"
    assert "alone: person left out: only one image" in capsys.readouterr().out


@pytest.mark.parametrize(
    "people, sentence",
    [
        (None, "expected a folder of people, got nothing"),
        (0, "at least 4 people .* got 0"),
        (3, "got 3; .*FACES/person/image"),
    ],
)
def test_a_useless_folder_gets_a_sentence(faces, tmp_path, people, sentence):
    folder = tmp_path / "faces"
    if people is not None:
        folder.mkdir()
        for person in range(people):
            (folder / f"person_{person}").symlink_to(faces / f"person_{person}")
    with pytest.raises(SystemExit, match=sentence):
        ff.main([str(folder), "--out", str(tmp_path / "out")])


def test_an_image_that_goes_bad_later_is_named(faces, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"x")
    data = ff.Faces({"a": [bad]}, ["a"], SIZE)
    with pytest.raises(RuntimeError, match=r"bad\.png: was readable at the start and is not any more"):
        data[0, False]


def test_resume_refuses_another_run(arguments, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="there is no checkpoint"):
        ff.main([*arguments, *out, "--resume"])
    ff.main([*arguments, *out, "--stop-after", "1"])
    with pytest.raises(SystemExit, match=r"of another run: --lr was 0\.01 and is 0\.5"):
        ff.main([*arguments, *out, "--resume", "--lr", "0.5"])


def test_a_backbone_that_gives_no_embeddings_is_refused(arguments, tmp_path):
    for name, sentence in (
        (f"{tmp_path / 'net.py'}:nothing", "has no function 'nothing'"),
        (f"{tmp_path / 'gone.py'}:make", "there is no file"),
        ("make", "expected file.py:function"),
        (f"{tmp_path / 'net.py'}:scalar", r"expected embeddings \[2, D\] for two images"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            ff.main([*arguments, "--out", str(tmp_path / "out"), "--backbone", name])


def test_pairs_are_distinct_and_rightly_labelled():
    labels = np.repeat(np.arange(5), 4)
    pairs = ff.sample_pairs(labels, 25, seed=0)
    assert pairs.same.sum() == (~pairs.same).sum() == 25  # of 30 same pairs in all
    assert ((labels[pairs.first] == labels[pairs.second]) == pairs.same).all()
    assert len(set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))) == 50
    assert (pairs.first != pairs.second).all()


def test_held_out_people_are_not_trained_on():
    people = {f"p{i}": [] for i in range(10)}
    trained, held = ff.split(people, 0.3, seed=0)
    assert len(held) == 3
    assert set(trained) | set(held) == set(people)
    assert not set(trained) & set(held)
    assert ff.split(people, 0.3, seed=1)[1] != held
