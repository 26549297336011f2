"""Files that load_head reads: nothing in them runs, and what is foreign or damaged is refused by name."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

import normface_ext as nf

ROWS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def saved(content, legacy=False):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def repacked(data, change, compression=zipfile.ZIP_STORED):
    """The same archive with entries that `change` has made others of: {name: bytes} in, the same out."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, value in change(entries).items():
            archive.writestr(name, value)
    return file.getvalue()


def pickle_of(entries, edit):
    name = next(name for name in entries if name.endswith("data.pkl"))
    return {**entries, name: edit(entries[name])}


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refused(tmp_path, data, text, name="head.pt"):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=text) as raised:
        nf.load_head(path)
    said = str(raised.value)
    assert name in said and len(said) <= 300, said
    return said


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "call", [(os.mkdir, "ran"), (eval, "__import__('os').mkdir('ran')"), (open, "ran", "w"), (np.load, "ran")]
)
@pytest.mark.parametrize("where", ["beside", "in the place of the weight", "as a key"])
def test_nothing_in_a_file_runs(tmp_path, monkeypatch, call, legacy, where):
    monkeypatch.chdir(tmp_path)
    function, *arguments = call
    evil = Call(function, *arguments)
    content = {
        "beside": {"W": ROWS, "x": evil},
        "in the place of the weight": {"W": evil},
        "as a key": {"W": ROWS, evil: 1},
    }[where]  # fmt: skip
    path = tmp_path / "head.pt"
    path.write_bytes(saved(content, legacy))
    if function is np.load and not legacy and where != "in the place of the weight":
        nf.load_head(path)  # NumPy's names are those of trainers' numbers: an empty object takes their place
    else:
        refused(tmp_path, path.read_bytes(), "expected")
    assert not (tmp_path / "ran").exists()


def test_a_name_that_may_run_code_is_said(tmp_path):
    said = refused(
        tmp_path, saved({"W": ROWS, "x": Call(os.getcwd)}), "asks for 'posix.getcwd', which may run"
    )
    assert said.endswith("load it yourself and pass the state_dict")


@pytest.mark.parametrize(
    ("data", "text", "name"),
    [
        (b"", "got one that begins with b''", "head.pt"),
        (b"\x89HDF\r\n\x1a\n" + b"x" * 99, "begins with b'", "model.h5"),
        (b"name: 'net'", "normface_ext.caffe.load_head reads it", "head.prototxt"),
        (b"\x0a\x03net", r"load_caffemodel\(file\) reads it", "head.caffemodel"),
        (b"\x08\x07", "an ONNX graph has no training head", "head.onnx"),
        (pickle.dumps({"W": [1.0, 2.0]}, protocol=2), "expected a file of tensors", "head.pkl"),
        (pickle.dumps({"W": [1.0, 2.0]}), "expected a file of tensors", "head.pkl"),
        (b"\x80\x02", "expected a file of tensors", "head.pt"),
        (b"PK\x03\x04", "expected a file of tensors", "head.pt"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "got no tensors", "head.safetensors"),
        (b"\xff" * 8 + b"{}", "expected a file of tensors", "head.safetensors"),
    ],
)
def test_foreign_files(tmp_path, data, text, name):
    refused(tmp_path, data, text, name)


def test_torchscript_and_other_archives(tmp_path):
    program = repacked(saved({"W": ROWS}), lambda entries: {**entries, "archive/constants.pkl": b""})
    refused(tmp_path, program, "a TorchScript program; save the state_dict")
    np.savez(tmp_path / "arrays.npz", W=np.ones((3, 5)))
    refused(tmp_path, (tmp_path / "arrays.npz").read_bytes(), "a zip file without data.pkl")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        nf.load_head(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        nf.load_head([tmp_path / "none.pt"])


@pytest.mark.parametrize("offset", [0.2, 0.5, 0.9])
def test_a_flipped_bit_is_noticed(tmp_path, offset):
    data = bytearray(saved({"W": torch.randn(300, 200)}))
    data[int(len(data) * offset)] ^= 1
    refused(tmp_path, bytes(data), "an entry 'archive/data/0' with another checksum: it is damaged")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_ends_early(tmp_path, legacy):
    data = saved({"W": ROWS}, legacy)
    for end in range(2, len(data), 37):
        refused(tmp_path, data[:end], "expected")


def test_archives_that_claim_what_they_have_not(tmp_path):
    data = saved({"W": ROWS})
    bomb = repacked(data, lambda entries: {**entries, "archive/data/0": bytes(1 << 22)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 10_000
    refused(tmp_path, bomb, "a compressed entry 'archive/data.pkl'")
    longer = repacked(data, lambda entries: pickle_of(entries, lambda p: p.replace(b"K\x0f", b"M\x0f\x10")))
    refused(tmp_path, longer, "expected a file of tensors")
    gone = repacked(data, lambda entries: {k: v for k, v in entries.items() if not k.endswith("data/0")})
    refused(tmp_path, gone, "expected a file of tensors")


def test_knots(tmp_path):
    knot = {"state_dict": {"W": ROWS.T}}
    knot["state_dict"]["again"] = knot
    knot["again"] = knot
    (tmp_path / "knot.pt").write_bytes(saved(knot))
    assert torch.equal(nf.load_head(tmp_path / "knot.pt").head.weight, ROWS)


def test_a_large_file_is_mapped_and_the_head_is_a_copy(tmp_path):
    path = tmp_path / "head.pt"
    path.write_bytes(
        saved({"state_dict_softmax_fc": {"weight": ROWS}, "state_dict_backbone": {"a": torch.ones(9, 9)}})
    )
    head, _ = nf.load_head(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(head.weight, ROWS)
    assert head.weight.untyped_storage().nbytes() == ROWS.numel() * 4
    with torch.no_grad():
        head.weight.zero_()


def test_a_shared_storage_gives_its_part(tmp_path):
    whole = torch.randn(10, 6)
    (tmp_path / "head.pt").write_bytes(saved({"a": whole, "W": whole[2:6, 1:4]}))
    assert torch.equal(nf.load_head(tmp_path / "head.pt").head.weight, whole[2:6, 1:4].T)
