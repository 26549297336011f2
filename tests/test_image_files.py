"""Broken, hostile and strange images and IDX files: a sentence that names the file, and nothing is run."""

from __future__ import annotations

import gzip
import io
import os
import struct
import warnings
import zlib
from functools import partial

import common
import idx
import images
import numpy as np
import pytest
from fuzz.readers import assert_contract
from PIL import Image

# Images


def picture(kind: str, size: tuple[int, int] = (20, 20), mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, 1).save(out, kind)
    return out.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["1.jpg", "1.png", "1.webp", "1.bmp"])
@pytest.mark.parametrize("kind", ["EPS", "PDF", "TIFF", "GIF", "PPM", "ICO", "TGA"])
def test_only_the_kinds_that_the_names_promise_are_opened(tmp_path, name, kind):
    """Pillow starts Ghostscript on the first; the contract finds a program that is started."""
    path = tmp_path / name
    path.write_bytes(POSTSCRIPT if kind == "EPS" else picture(kind))
    error = assert_contract(lambda path: images.read_image(path, 8), path)
    assert isinstance(error, ValueError) and "expected an image (JPEG, PNG, BMP, WEBP)" in str(error)


@pytest.mark.parametrize("kind", images.FORMATS)
def test_a_name_may_promise_another_of_them(tmp_path, kind):
    (tmp_path / "1.jpg").write_bytes(picture(kind))
    assert images.read_image(tmp_path / "1.jpg", 8).shape == (3, 8, 8)


def png(width: int, height: int, rows: int) -> bytes:
    """A PNG that claims so many pixels and has the first rows of them, all 0."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compress(bytes((1 + 3 * width) * min(height, rows)), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(3000, 3000, 3000), (10_000, 9_000, 10), (60_000, 60_000, 10)])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error = assert_contract(lambda path: images.read_image(path, 8), path)
    assert isinstance(error, ValueError) and "pixels" in str(error)


def test_sixteen_bits_are_not_cut_to_eight(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((9, 9), 30_000, np.uint16)).save(path)
    error = assert_contract(lambda path: images.read_image(path, 8), path)
    assert isinstance(error, ValueError) and "mode I" in str(error)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: .*no regular file"):
        images.read_image(tmp_path / "1.png", 8)


# IDX


def raw(*shape: int, rank: int = 3, data: int = 120) -> bytes:
    return bytes([0, 0, 8, rank]) + struct.pack(f">{len(shape)}i", *shape) + bytes(data)


GOOD = gzip.compress(raw(4, 5, 6), mtime=0)


@pytest.mark.parametrize(
    "data",
    [
        b"", GOOD[:30], GOOD[:-9], GOOD[:-4], raw(4, 5, 6), GOOD[:20] + bytes([GOOD[20] ^ 255]) + GOOD[21:],
        GOOD[:-6] + b"\0\0" + GOOD[-4:], GOOD + b"x",
        *map(partial(gzip.compress, mtime=0), [
            b"", b"\0\0\x08", raw(4, 5, 7), raw(4, 5, 5), raw(-1, 5, 6), raw(-4, -5, 6), raw(0, 5, 6, data=0),
            raw(2**31 - 1, 5, 6), raw(2**31 - 1, 2**31 - 1, 2**31 - 1), raw(120, rank=0), raw(120, rank=255),
            raw(1, 120, rank=3, data=0), b"\0\0\x09" + raw(4, 5, 6)[3:],
            raw(1 << 14, 1 << 14, data=0, rank=2), raw(4, 5, 6, data=60_000_000),
        ]),
    ],
)  # fmt: skip
def test_a_broken_idx_file(tmp_path, data):
    path = tmp_path / "images.gz"
    path.write_bytes(data)
    error = assert_contract(idx.read, path)
    assert isinstance(error, ValueError) and "expected" in str(error), error
    with pytest.raises(SystemExit, match=r"images\.gz"):
        common.read_idx(path)


def test_idx_files_that_do_not_belong_together(tmp_path, monkeypatch):
    def write(images: tuple[int, ...], labels: np.ndarray) -> None:
        for part in ("train", "t10k"):
            for kind, array in (("images-idx3", np.zeros(images, np.uint8)), ("labels-idx1", labels)):
                head = raw(*array.shape, rank=array.ndim, data=0)
                (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))

    for shape, labels in (((4, 5, 5), np.zeros(3, np.uint8)), ((4, 5, 5), np.zeros((4, 1), np.uint8))):
        write(shape, labels)
        with pytest.raises(SystemExit, match=r"train-images.*an image for each label of train-labels"):
            common.fashion(tmp_path)
    write((4, 5, 5), np.array([0, 1, 2, 10], np.uint8))
    monkeypatch.setattr(common, "fashion", lambda fashion=common.fashion: fashion(tmp_path))
    with pytest.raises(SystemExit, match="labels from 0 to 9, got 10"):
        common.load(common.parser(None, "x", common.Size(1, 1)).parse_args(["--data", "fashion-mnist"]))
