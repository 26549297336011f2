"""Features of images: a backbone over batches, with mirrors as InsightFace and the paper take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.arguments import FINITE, POSITIVE, choice, flag, integer, number
from ..mirror import MirrorFace
from ._checks import Array, as_features
from ._optional import require
from .bins import VerificationSet, decode_images

_Step = TypeVar("_Step")


def progress(steps: Iterable[_Step], total: int, what: str, shown: bool) -> Iterable[_Step]:
    """The steps, with a bar on stderr if it is asked for (tqdm)."""
    if not shown:
        return steps
    bar: Iterable[_Step] = require("tqdm", f"the progress bar of {what}").tqdm(steps, total=total, desc=what)
    return bar


def _batches(images: object, size: int | tuple[int, int]) -> tuple[int, Callable[[int, int], Tensor]]:
    """How many images there are, and a function that gives some of them."""
    op = "embed"
    if isinstance(images, VerificationSet):
        images = images.images
    if isinstance(images, Tensor):
        if images.dim() != 4 or len(images) == 0:
            raise ValueError(f"{op}: expected `images` to be [N, C, H, W], N >= 1, got {list(images.shape)}")
        held = images
        return len(held), lambda start, end: held[start:end]
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes)) or len(images) == 0:
        raise TypeError(
            f"{op}: expected `images` to be a VerificationSet, a row of encoded images or a Tensor"
            f" [N, C, H, W], not empty, got {type(images).__name__}"
        )
    encoded = images
    return len(encoded), lambda start, end: decode_images(encoded[start:end], size, first=start)


def embed(
    images: VerificationSet | Sequence[bytes] | Tensor,
    model: nn.Module | Callable[[Tensor], Tensor],
    *,
    flip: str = "sum",
    batch_size: int = 64,
    size: int | tuple[int, int] = 112,
    mean: float = 127.5,
    std: float = 127.5,
    channels: str = "rgb",
    device: str | torch.device | None = None,
    progress_bar: bool = False,
) -> Array:
    """Features of images, [N, D] float32, as InsightFace's verification takes them.

    Images are decoded batch by batch, x = (pixel - mean) / std, and with ``flip="sum"`` the feature is
    f(x) + f(mirror of x), before any normalisation. Nothing is kept but the features. A module runs in
    evaluation mode, without gradients, and gets back the mode it had.

        features = embed(read_bin("lfw.bin"), backbone)

    Args:
        images: a VerificationSet, encoded images, or pixels [N, C, H, W] of any real type, 0 to 255.
        model: [B, C, H, W] float32 -> [B, D]. Its parameters stay where they are.
        flip: how the mirror is merged: "sum", "max", "concat" (``MirrorFace``), or "none".
        batch_size: images at a time; the model sees twice as many with a mirror.
        size: of encoded images after decoding, H and W where they differ.
        channels: "rgb", or "bgr" for models that were trained on OpenCV's order.
        device: of the batches; by default that of the model's parameters.
        progress_bar: through tqdm, on stderr.

    Raises:
        ValueError, TypeError: an image that cannot be decoded, by its number; a model that does not return
            [B, D] finite numbers.
        ImportError: without Pillow, or without tqdm if a bar is asked for.
    """
    op = "embed"
    batch = integer(op, "batch_size", batch_size, 1)
    shift, scale = number(op, "mean", mean, FINITE), number(op, "std", std, POSITIVE)
    merge = choice(op, "flip", flip, ("sum", "max", "concat", "none"))
    backwards = choice(op, "channels", channels, ("rgb", "bgr")) == "bgr"
    count, some = _batches(images, size)
    if not callable(model):
        raise TypeError(f"{op}: expected `model` to be a module or a function, got {type(model).__name__}")
    module = model if isinstance(model, nn.Module) else None
    if device is None and module is not None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
    net: Callable[[Tensor], Any] = model if merge == "none" else _mirrored(model, merge)
    starts = range(0, count, batch)
    features: list[Array] = []
    training = module is not None and module.training
    try:
        if module is not None:
            module.eval()
        with torch.inference_mode():
            for start in progress(starts, len(starts), "embed", flag(op, "progress_bar", progress_bar)):
                end = min(start + batch, count)
                pixels = some(start, end).to(device=device, dtype=torch.float32)
                pixels = (pixels.flip(1) if backwards else pixels).sub(shift).div(scale)
                features.append(_rows(op, net(pixels), start, end))
    finally:
        if module is not None:
            module.train(training)
    return np.concatenate(features)


def _mirrored(model: Callable[[Tensor], Tensor], merge: str) -> nn.Module:
    class Function(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model(images)

    return MirrorFace(model if isinstance(model, nn.Module) else Function(), merge)


def _rows(op: str, found: object, start: int, end: int) -> Array:
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != end - start:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{op}: expected `model` to return [{end - start}, D], got {got}")
    rows: Array = as_features(op, f"features of images {start} to {end - 1}", found.float())
    return rows
