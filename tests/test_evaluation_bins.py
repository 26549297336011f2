"""InsightFace's .bin: what is packed is read, and a pickle that asks for anything else is refused by name."""

from __future__ import annotations

import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.readers import assert_contract

from normface_ext import evaluation as ev

IMAGES = [bytes(np.random.default_rng(i).integers(0, 256, 40 + i, dtype=np.uint8)) for i in range(12)]
SAME = [True, False, True, True, False, False]


def python2(images: list[bytes], same: list[bool]) -> bytes:
    """What cPickle of Python 2 writes for (list of str, list of bool), protocol 2."""
    data = b"\x80\x02]q\x01("
    for i, image in enumerate(images):
        data += (
            b"U" + bytes([len(image)]) + image if i % 2 else b"T" + len(image).to_bytes(4, "little") + image
        )
        data += b"q" + bytes([i + 2])
    return data + b"e]q\x64(" + b"".join(b"\x88" if value else b"\x89" for value in same) + b"e\x86q\x0f."


FORMS = {
    **{f"protocol {p}": pickle.dumps((IMAGES, SAME), p) for p in range(6)},
    "lists": pickle.dumps([tuple(IMAGES), tuple(SAME)], 4),
    "bytearrays": pickle.dumps((list(map(bytearray, IMAGES)), SAME), 5),
    "0 and 1": pickle.dumps((IMAGES, list(map(int, SAME))), 4),
    "NumPy's bools": pickle.dumps((IMAGES, list(map(np.bool_, SAME))), 4),
    "an array of bools": pickle.dumps((IMAGES, np.array(SAME)), 4),
    **{
        f"arrays of bytes, protocol {p}": pickle.dumps(
            ([np.frombuffer(image, np.uint8) for image in IMAGES], SAME), p
        )
        for p in range(6)
    },
    "arrays that own their bytes": pickle.dumps(([np.array(list(i), np.uint8) for i in IMAGES], SAME), 5),
    "Python 2": python2(IMAGES, SAME),
    "NumPy 1": pickle.dumps(([np.frombuffer(i, np.uint8) for i in IMAGES], SAME), 2).replace(
        b"numpy._core", b"numpy.core"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path: Path, form: str):
    path = tmp_path / "lfw.bin"
    path.write_bytes(FORMS[form])
    found = assert_contract(ev.read_bin, path)
    assert found.images == tuple(IMAGES) and found.same.tolist() == SAME and len(found) == 6
    pairs = found.pairs(4)
    assert pairs.first.tolist() == [0, 2, 4, 6, 8, 10] and pairs.second.tolist() == [1, 3, 5, 7, 9, 11]
    assert pairs.same.tolist() == SAME and pairs.fold.tolist() == [0, 0, 1, 1, 2, 3]


class Calls:
    """Unpickled, it would call something."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> object:
        return self.reduced


def packed(value: object, protocol: int) -> bytes:
    return pickle.dumps(value, protocol)


EVIL = {
    "os.system": Calls(os.system, "echo evil"),
    "posix.system": Calls(os.system, "echo evil"),
    "builtins.eval": Calls(eval, "1 + 1"),
    "builtins.exec": Calls(exec, "x = 1"),
    "builtins.getattr": Calls(getattr, "a", "upper"),
    "builtins.bytearray": Calls(bytearray, 10),
    "torch": torch.nn.Linear(1, 1),
    "EMPTY_DICT": {"a": 1},
    "a set": {1},
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", EVIL)
def test_what_else_a_pickle_asks_for_is_refused_and_not_run(
    tmp_path: Path, name: str, protocol: int, capfd: pytest.CaptureFixture[str]
):
    path = tmp_path / "lfw.bin"
    for value in (EVIL[name], (IMAGES, [EVIL[name]]), ([EVIL[name]] * 2, [True])):
        path.write_bytes(packed(value, protocol))
        error = assert_contract(ev.read_bin, path)  # its audit hook sees exec, system, open for writing
        assert isinstance(error, ValueError)
        assert "lfw.bin: expected a pickle of (list of encoded images, list of answers), got the " in str(
            error
        )
        assert "which such a file does not need" in str(error)
    assert capfd.readouterr().out == ""


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "got "),
        (b"\xff" * 50, "got "),
        (FORMS["protocol 4"][:-1], "got "),
        (FORMS["protocol 4"][:200], "got "),
        (opcodes(b"]r\xff\xff\xff\x7f"), "place 2147483647 of a table"),
        (opcodes(b"]" * 5000), "more than 2250 opcodes"),
        (opcodes(b"\x96" + (1 << 40).to_bytes(8, "little")), "got "),
        (opcodes(b"\x8e" + (1 << 40).to_bytes(8, "little")), "got "),
        (opcodes(b"cnumpy\ndtype\n(\x8c\x02O8K\0K\x01tR"), "an array of 'O8', not of bytes or bools"),
        (opcodes(b"cnumpy\ndtype\n]\x85R"), "an array of list, not of bytes or bools"),
        (opcodes(b"cnumpy\nndarray\n)R"), "an array made by its type"),
        (opcodes(b"cbuiltins\nbytes\nK\x05\x85R"), "bytes made of something"),
        (opcodes(b"c_codecs\nencode\n(\x8c\x01a\x8c\x04utf8tR"), "text in an unknown encoding"),
        (opcodes(b"\x8c\x02os\x8c\x06system\x93"), "the name 'os.system'"),
        (opcodes(b"cos\nsystem\n"), "the name 'os.system'"),
        (opcodes(b"Pabc\n"), "the pickle opcode PERSID at byte 2"),
        (pickle.dumps(3), "a pickle of int"),
        (pickle.dumps((IMAGES,)), "a pickle of tuple"),
        (pickle.dumps((IMAGES, SAME, SAME)), "a pickle of tuple"),
        (pickle.dumps((IMAGES, 3)), "(list, int)"),
        (pickle.dumps((b"x", SAME)), "(bytes, list)"),
        (pickle.dumps((["a"] * 12, SAME)), "str as image 0"),
        (pickle.dumps(([*IMAGES[:11], 7], SAME)), "int as image 11"),
        (pickle.dumps((IMAGES, [*SAME[:5], 2])), "int at 5"),
        (pickle.dumps((IMAGES, [*SAME[:5], None])), "NoneType at 5"),
        (pickle.dumps((IMAGES, SAME[:5])), "two images for each answer, got 12 images and 5 answers"),
        (pickle.dumps(([], [])), "two images for each answer, got 0 images and 0 answers"),
        (pickle.dumps(([np.ones(3)] * 2, [True])), "an array of 'f8', not of bytes or bools"),
        (pickle.dumps(([np.ones((4, 4), np.uint8)] * 2, [True])), "an array that is no row of bytes"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, data: bytes, sentence: str):
    path = tmp_path / "lfw.bin"
    path.write_bytes(data)
    error = assert_contract(ev.read_bin, path)
    assert isinstance(error, ValueError) and "lfw.bin: expected " in str(error), error
    assert sentence in str(error), error


def test_lists_that_share_lists_are_not_written_out(tmp_path: Path):
    """Ten lists of ten times the list before: its repr would have ten billion characters."""
    value: object = [1]
    for _ in range(10):
        value = [value] * 10
    path = tmp_path / "lfw.bin"
    for whole in (value, (value, [True]), (IMAGES, value), (IMAGES[:2], [value])):
        path.write_bytes(pickle.dumps(whole))
        assert isinstance(assert_contract(ev.read_bin, path), ValueError)


def test_a_set_has_two_images_for_each_answer():
    with pytest.raises(ValueError, match=r"VerificationSet: expected two images .*, got 3 images and 1 "):
        ev.VerificationSet((b"a",) * 3, [True])
    with pytest.raises(ValueError, match="VerificationSet: expected `same` to be bool or 0 and 1"):
        ev.VerificationSet((b"a",) * 2, [2])
    assert ev.VerificationSet((b"a",) * 4, [1, 0]).same.dtype == np.bool_


def test_every_opcode_is_either_needed_or_refused():
    from normface_ext.evaluation._unpickle import _ALLOWED

    assert {opcode.name for opcode in pickletools.opcodes} >= _ALLOWED
    assert not _ALLOWED & {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "PERSID", "BINPERSID", "NEXT_BUFFER"}
