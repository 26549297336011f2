"""python -m normface_ext.evaluation: every command says what the functions say; its help shows each."""

from __future__ import annotations

import csv
import pickle
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluation_embedding import PIXELS, encoded
from test_protocols_cfp import cfp_folder

from normface_ext import evaluation as ev
from normface_ext.evaluation.__main__ import DESCRIPTION, build_parser, main
from normface_ext.evaluation.commands import COMMANDS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(capsys: pytest.CaptureFixture[str], command: str, code: int = 0) -> dict[str, str]:
    """What the command prints, by name; "found" is its first line."""
    assert main(shlex.split(command)) == code
    printed = capsys.readouterr()
    if code:
        assert not printed.out
        return {"error": printed.err}
    assert not printed.err
    first, *lines = printed.out.splitlines()
    return {"found": first, **{line.rsplit(None, 1)[0]: line.rsplit(None, 1)[1] for line in lines}}


def people(
    seed: int = 0, count: int = 40, images: int = 2, noise: float = 0.9
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    who = np.repeat(np.arange(count), images)
    return random.normal(size=(count, 8))[who] + noise * random.normal(size=(len(who), 8)), who


def test_the_help_has_an_example_of_each_that_parses():
    parser = build_parser()
    shown = DESCRIPTION.replace("\n                      --", " --").splitlines()
    examples = [line.split("COMMAND ", 1)[1] for line in shown if line.strip().startswith("COMMAND")]
    assert [example.split()[0] for example in examples] == list(COMMANDS)
    for example in examples:
        assert parser.parse_args(shlex.split(example)).command == example.split()[0]
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0


@pytest.mark.parametrize("command", ["", "pairs "])
def test_pairs_of_every_kind(folder: Path, capsys: pytest.CaptureFixture[str], command: str):
    features, who = people()
    np.savez("F.npz", features=features, other=features[:3])
    names = [f"Åsa {p}/{i}.jpg" for i, p in enumerate(who)]
    Path("names.txt").write_text("\n".join(names), encoding="latin-1")
    pairs = [(i, i + 1, 1) for i in range(0, 80, 2)] + [(i, (i + 5) % 80, 0) for i in range(0, 80, 2)]
    Path("pairs.csv").write_text(
        "left,right,y\n" + "\n".join(f"{names[i]},{names[j]},{y}" for i, j, y in pairs), encoding="latin-1"
    )
    found = table(
        capsys,
        f"{command}--features F.npz --array features --names names.txt --pairs pairs.csv --encoding latin-1"
        " --columns first=left,second=right,same=y --folds 4 --far 0.1 0.5 --plot roc.png"
        " --histogram scores.pdf --csv t.csv",
    )
    truth = ev.Pairs.in_folds(*map(list, zip(*pairs, strict=True)), 4)
    result = ev.lfw_protocol(features, truth)
    assert found["accuracy"] == f"{result.accuracy:.4f}" and found["pairs"] == "80"
    assert found["found"] == "pairs.csv: 'columns named in a header' between commas, ISO8859-1," \
        " 80 pairs, 40 of them same, cut into 4 folds, 80 names"  # fmt: skip
    assert found["TAR@FAR=0.5"] == f"{ev.tar_at_far(result.scores, truth.same, 0.5)[0]:.4f}"
    assert Path("roc.png").read_bytes()[:4] == b"\x89PNG" and Path("scores.pdf").read_bytes()[:4] == b"%PDF"
    with open("t.csv") as file:
        rows = {row["measure"]: row["value"] for row in csv.DictReader(file)}
    assert rows["pairs"] == "80" and float(rows["accuracy of fold 4"]) == pytest.approx(result.accuracies[3])
    grid = table(
        capsys,
        f"{command}--features F.npz --array features --names names.txt --pairs pairs.csv --encoding latin-1"
        " --columns first=1,second=0,same=2 --folds 4 --thresholds grid",
        code=1,
    )
    assert "pairs.csv:1: expected" in grid["error"]  # by number the header is a line


def test_lfw_has_a_header_and_a_pca(folder: Path, capsys: pytest.CaptureFixture[str]):
    features, who = people()
    np.save("F.npy", features)
    Path("names.txt").write_text("\n".join(f"P_{p}/P_{p}_{i % 2 + 1:04d}.jpg" for i, p in enumerate(who)))
    lines = ["2 20"]
    for fold in (range(20), range(20, 40)):
        lines += [f"P_{p} 1 2" for p in fold] + [f"P_{p} 1 P_{(p + 3) % 40} 2" for p in fold]
    Path("pairs.txt").write_text("\n".join(lines))
    names = [f"P_{p}_{i % 2 + 1:04d}" for i, p in enumerate(who)]
    truth = ev.lfw_protocol(features, ev.read_lfw_pairs("pairs.txt", names), pca=4)
    found = table(capsys, "lfw --features F.npy --names names.txt --pairs pairs.txt --pca 4")
    assert found["accuracy"] == f"{truth.accuracy:.4f}" and "'LFW, with its header'" in found["found"]
    wrong = table(capsys, "lfw --features F.npy --names names.txt --pairs names.txt", code=1)
    assert "names.txt:1: expected" in wrong["error"]
    both = table(
        capsys, "lfw --features F.npy --names names.txt --pairs pairs.txt --pca 4 --thresholds grid", code=1
    )
    assert "--pca" in both["error"]


def test_bin_by_a_backbone_and_by_features(folder: Path, capsys: pytest.CaptureFixture[str]):
    same = [True, False] * 12
    images = [encoded(PIXELS[i % 12]) for i in range(48)]
    Path("lfw.bin").write_bytes(pickle.dumps((images, same)))
    Path("my_net.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    pool, flat = torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()\n"
        "    return torch.nn.Sequential(pool, flat, torch.nn.Linear(48, 6))\n"
    )
    by_net = table(capsys, "bin lfw.bin --backbone my_net.py:make --size 16 --folds 4 --batch-size 7")
    net = runpy.run_path("my_net.py")["make"]()
    torch.save(net.state_dict(), "net.pt")
    images_read = ev.read_bin("lfw.bin")
    features = ev.embed(images_read, net, size=16)
    np.save("F.npy", features)
    truth = ev.fold_protocol(features, images_read.pairs(4))
    assert by_net["accuracy"] == f"{truth.accuracy:.4f}" and by_net["pairs"] == "24"
    for options in ("--features F.npy", "--backbone my_net.py:make --weights net.pt --size 16"):
        assert table(capsys, f"bin lfw.bin {options} --folds 4") == by_net
    np.save("F.npy", features[:-1])
    few = table(capsys, "bin lfw.bin --features F.npy", code=1)
    assert "F.npy: expected 48 rows, one for each image, got 47" in few["error"]
    for backbone in ("my_net.py", "my_net.py:gone", "gone.py:make", "my_net.py:torch"):
        sentence = "gone.py" if backbone == "gone.py:make" else "--backbone: expected"
        assert sentence in table(capsys, f"bin lfw.bin --backbone {backbone}", code=1)["error"]
    with pytest.raises(SystemExit):
        main(["bin", "lfw.bin"])


def test_cfp(folder: Path, capsys: pytest.CaptureFixture[str]):
    names, _ = cfp_folder(folder)
    features = np.random.default_rng(0).normal(size=(12, 5))
    np.save("F.npy", features)
    truth = ev.fold_protocol(features, ev.read_cfp("Protocol", "FP").pairs)
    found = table(capsys, "cfp Protocol --protocol FP --features F.npy")
    assert found["accuracy"] == f"{truth.accuracy:.4f}" and "CFP-FP, 6 pairs" in found["found"]
    Path("names.txt").write_text("\n".join(names))
    assert table(capsys, "cfp . --features F.npy --names names.txt") == {
        **found, "found": found["found"]
    }  # fmt: skip
    np.save("F.npy", features[:6])
    assert table(capsys, "cfp Protocol --protocol FF --features F.npy")["pairs"] == "6"
    assert "expected 12 rows" in table(capsys, "cfp Protocol --features F.npy", code=1)["error"]


def test_ijb(folder: Path, capsys: pytest.CaptureFixture[str]):
    features, who = people(images=4)
    np.save("F.npy", features)
    template = np.arange(160) // 2
    Path("tid.txt").write_text("\n".join(f"{i}.jpg {t} {i}" for i, t in enumerate(template)))
    Path("score.txt").write_text("\n".join(f"{i}.jpg 1 2 {1 + i % 3}" for i in range(160)))
    random = np.random.default_rng(0)
    pairs = [(a, b, int(who[2 * a] == who[2 * b])) for a, b in random.integers(0, 80, (3000, 2)) if a != b]
    Path("pairs.txt").write_text("\n".join(f"{a} {b} {y}" for a, b, y in pairs))
    listed = ev.TemplatePairs(*map(list, zip(*pairs, strict=True)))
    images = ev.TemplateImages(template, np.arange(160))
    for option, weights, how in (
        ("", None, "below"),
        ("--scores score.txt", 1 + np.arange(160) % 3, "below"),
        ("--how nearest", None, "nearest"),
    ):  # fmt: skip
        found = table(
            capsys, f"ijb --features F.npy --templates tid.txt --pairs pairs.txt {option} --histogram h.png"
        )
        truth = ev.ijb_protocol(features, images, listed, weights=weights).tar(how=how)
        assert [found[f"TAR@FAR={far:g}"] for far in ev.IJB_RATES] == [f"{rate:.4f}" for rate in truth]
    assert found["pairs"] == str(len(pairs)) and "160 images of 80 templates" in found["found"]
    Path("score.txt").write_text("1.jpg 1\n")
    few = table(
        capsys, "ijb --features F.npy --templates tid.txt --pairs pairs.txt --scores score.txt", code=1
    )
    assert "score.txt: expected 160 scores" in few["error"]


def test_identify(folder: Path, capsys: pytest.CaptureFixture[str]):
    features, who = people(count=30)
    crowd = np.random.default_rng(3).normal(size=(50, 8))
    gallery, probes = features[::2][:20], features[1::2]
    for name, array in (("G", gallery), ("P", probes), ("D", crowd)):
        np.save(f"{name}.npy", array)
    Path("g.txt").write_text("\n".join(f"person {p}" for p in who[::2][:20]))
    Path("p.txt").write_text("\n".join(f"person {p}" for p in who[1::2]))
    command = "identify --gallery G.npy --gallery-labels g.txt --probes P.npy --probe-labels p.txt"
    found = table(capsys, f"{command} --distractors D.npy --ranks 1 3 --fpir 0.1 --plot cmc.png")
    truth = ev.identify(gallery, who[::2][:20], probes, who[1::2], distractors=crowd)
    assert found["rank 3"] == f"{truth.rank_rate(3)[0]:.4f}" and found["people"] == "70"
    assert found["TPIR@FPIR=0.1"] == f"{truth.tpir(0.1)[0]:.4f}" and found["known probes"] == "20"
    assert Path("cmc.png").read_bytes()[:4] == b"\x89PNG"
    Path("p.txt").write_text("person 1\n")
    assert "p.txt: expected 30 labels" in table(capsys, command, code=1)["error"]


def test_blufr_and_ytf(folder: Path, capsys: pytest.CaptureFixture[str]):
    features, who = people(images=3)
    np.save("F.npy", features)
    Path("people.txt").write_text("\n".join(f"p{p:02d}" for p in who))
    found = table(capsys, "blufr --features F.npy --labels people.txt --trials 3")
    truth = ev.blufr(features, who, ev.random_trials(who, trials=3)).report()
    assert found["verification rate at FAR 0.1 %, mean - deviation"] == f"{truth[0]:.4f}"
    assert found["DIR at FAR 1 %, rank 1, mean - deviation"] == f"{truth[1]:.4f}"
    random = np.random.default_rng(0)
    videos = {
        f"p{p}/{v}": random.normal(size=8) + random.normal(size=(4, 8)) for p in range(8) for v in (0, 1)
    }
    for name, frames in videos.items():
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "videos" / f"{name}.npy", frames)
    rows = [
        f"{p // 4}, 1, p{p}/0, p{p}/1, 1, 1\n{p // 4}, 2, p{p}/0, p{(p + 3) % 8}/1, 0, 0" for p in range(8)
    ]
    Path("splits.txt").write_text("\n".join(rows))
    found = table(capsys, "ytf --splits splits.txt --folder videos")
    truth_ytf = ev.ytf_protocol(videos, ev.read_ytf_splits("splits.txt", splits=2, pairs_per_split=8))
    assert found["accuracy (HIK-SVM)"] == f"{truth_ytf.accuracy:.4f}" and found["pairs"] == "16"
    (folder / "videos" / "p3" / "1.npy").unlink()
    assert "videos/p3/1.npy" in table(capsys, "ytf --splits splits.txt --folder videos", code=1)["error"]
