"""Mirror face (NormFace section 5): the feature of an image together with its horizontal mirror."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .engine.arguments import choice

MERGES = ("sum", "max", "concat")


class MirrorFace(nn.Module):
    """Features of images and their mirrors: backbone([x, flip(x)]) in one forward pass, then merged.

    The paper adds the two features (``"sum"``); its example prototxt takes the larger (``"max"``).

    Args:
        backbone: [B, C, H, W] -> [B, ...], any module that treats the rows of a batch alike. It sees a
            batch of 2N rows, the images first: batch normalisation in training mode averages over both.
        merge: "sum", "max" (elementwise), or "concat" along dimension 1.

    The forward call takes [N, C, H, W] and returns what the backbone returns for N rows, of twice its
    size along dimension 1 for "concat".

    Raises:
        ValueError: merge; an input that is not 4-D; a backbone that does not return 2N rows.
        TypeError: an input or an output of the backbone that is no tensor.
    """

    def __init__(self, backbone: nn.Module, merge: str = "sum") -> None:
        super().__init__()
        self.backbone: nn.Module = backbone
        self.merge: str = choice("MirrorFace", "merge", merge, MERGES)

    def forward(self, images: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check_images(images)
        features: Tensor = self.backbone(torch.cat([images, images.flip(3)]))
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check_features(images, features)
        rows = images.shape[0]
        front, mirrored = features[:rows], features[rows:]
        if self.merge == "sum":
            return front + mirrored
        if self.merge == "max":
            return torch.maximum(front, mirrored)
        return torch.cat([front, mirrored], dim=1)

    # A Proxy is torch.fx's, which cannot look.

    def _check_images(self, images: object) -> None:
        if isinstance(images, Proxy):
            return
        if not isinstance(images, Tensor):
            raise TypeError(f"MirrorFace: expected `images` to be a Tensor, got {type(images).__name__}")
        if images.dim() != 4:
            raise ValueError(
                f"MirrorFace: expected `images` to be 4-D [N, C, H, W], got shape {list(images.shape)}"
            )

    def _check_features(self, images: Tensor, features: object) -> None:
        if isinstance(features, Proxy):
            return
        if not isinstance(features, Tensor):
            raise TypeError(
                f"MirrorFace: expected the backbone to return a Tensor, got {type(features).__name__}"
            )
        rows = images.shape[0]
        least = 2 if self.merge == "concat" else 1
        if features.dim() < least or features.shape[0] != 2 * rows:
            raise ValueError(
                f"MirrorFace: expected the backbone to return [{2 * rows}, ...], got shape"
                f" {list(features.shape)}"
            )

    def extra_repr(self) -> str:
        return f"merge={self.merge!r}"
