"""embed: encoded images or pixels become the features that a plain loop over the backbone gives."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normface_ext import evaluation as ev

SAME = [True, False, True, True, False, False]


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 9, 7, 3), dtype=np.uint8)
SET = ev.VerificationSet(tuple(map(encoded, PIXELS)), np.array(SAME))


class Net(torch.nn.Module):
    """[B, 3, H, W] -> [B, 4]; in training mode it would say something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3 * 9 * 7, 4)
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        return self.linear(x.flatten(1)) + 100 * self.training


def test_images_are_decoded():
    assert torch.equal(ev.decode_images(SET.images, None), torch.tensor(PIXELS).permute(0, 3, 1, 2))
    grey = encoded(PIXELS[0, :, :, 0])
    assert torch.equal(ev.decode_images([grey], (9, 7))[0, 2], torch.tensor(PIXELS[0, :, :, 0]))
    assert ev.decode_images(SET.images, 112).shape == (12, 3, 112, 112)
    for kind in ("JPEG", "BMP", "WEBP"):
        assert ev.decode_images([encoded(PIXELS[0], kind)], None).shape == (1, 3, 9, 7)


@pytest.mark.parametrize(
    ("data", "size", "sentence"),
    [
        (b"no image", 112, "image 13: expected a JPEG, PNG, BMP or WebP image"),
        (SET.images[0][:60], 112, "image 13: expected a JPEG"),
        (encoded(PIXELS[0], "GIF"), 112, "image 13: expected a JPEG"),
        (
            encoded(np.zeros((5000, 5000), np.uint8)),
            112,
            "image 13: .*5000 x 5000 pixels, more than 1",
        ),
        (
            encoded(np.zeros((4, 4), np.uint8)),
            None,
            r"of one size, .*\(9, 7\) and \(4, 4\) at image 13",
        ),
    ],
)
def test_images_that_cannot_be_decoded_are_numbered(data: bytes, size: int | None, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        ev.decode_images([SET.images[0], data], size, first=12)


def plain_features(net: Net, pixels: np.ndarray, flip: str) -> np.ndarray:
    """InsightFace's ver_test: ((x / 255) - 0.5) / 0.5, and the mirror's feature added."""
    x = torch.tensor(pixels).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        front, back = (net.linear(((v / 255) - 0.5).div(0.5).flatten(1)) for v in (x, x.flip(3)))
    return {
        "sum": front + back, "none": front, "max": torch.maximum(front, back),
        "concat": torch.cat([front, back], 1),
    }[flip].numpy()  # fmt: skip


@pytest.mark.parametrize("flip", ["sum", "none", "max", "concat"])
@pytest.mark.parametrize("batch", [1, 5, 12, 100])
def test_features_are_those_of_the_plain_loop(flip: str, batch: int):
    net = Net()
    truth = plain_features(net, PIXELS, flip)
    net.train()
    found = ev.embed(SET, net, flip=flip, batch_size=batch, size=(9, 7))
    assert found.dtype == np.float32 and net.training
    np.testing.assert_allclose(found, truth, atol=1e-5)
    raw = torch.tensor(PIXELS).permute(0, 3, 1, 2)
    np.testing.assert_allclose(ev.embed(raw, net, flip=flip, batch_size=batch), truth, atol=1e-5)
    assert max(net.sizes) <= min(batch, 12) * (1 if flip == "none" else 2)


class Wide(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


def test_a_backbone_on_a_bin_in_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "lfw.bin"
    path.write_bytes(pickle.dumps((list(SET.images), SAME)))
    features = ev.embed(ev.read_bin(path), Wide(), size=32, progress_bar=True)
    assert features.shape == (12, 3) and "embed" in capsys.readouterr().err
    bgr = ev.embed(ev.read_bin(path), lambda x: x.mean(dim=(2, 3)), size=32, channels="bgr")
    np.testing.assert_allclose(bgr, features[:, ::-1], atol=1e-6)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda x: x, r"`model` to return \[4, D\], got \[4, 3, 9, 7\]"),
        (lambda x: x[:1].flatten(1), r"`model` to return \[4, D\], got \[1, 189\]"),
        (lambda x: None, r"`model` to return \[4, D\], got NoneType"),
        (
            lambda x: x.flatten(1) / 0,
            "`features of images 0 to 3` to be finite, got NaN or inf.* at row 0",
        ),
    ],
)
def test_models_that_return_something_else_are_named(model: object, sentence: str):
    raw = torch.tensor(PIXELS[:4]).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match=sentence):
        ev.embed(raw, model, flip="none")


def test_embed_names_its_arguments():
    raw = torch.tensor(PIXELS).permute(0, 3, 1, 2)
    for arguments, error, sentence in (
        ({"images": raw[0]}, ValueError, r"\[N, C, H, W\], N >= 1"),
        ({"images": []}, TypeError, "`images`"),
        ({"images": "lfw.bin"}, TypeError, "`images`"),
        ({"model": 3}, TypeError, "`model`"),
        ({"flip": "min"}, ValueError, "`flip`"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"std": 0}, ValueError, "`std`"),
        ({"channels": "gbr"}, ValueError, "`channels`"),
    ):
        given = {"images": raw, "model": Wide(), **arguments}
        with pytest.raises(error, match=sentence):
            ev.embed(given.pop("images"), given.pop("model"), **given)
