"""MirrorFace: one forward pass of images and mirrors, merged."""

import pytest
import torch
from torch import nn

import normface_ext as nf


class Counting(nn.Module):
    """Flattens and multiplies by a matrix that no mirror leaves alone; counts its calls."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(2 * 3 * 4, 5, dtype=torch.float64), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("merge", ["sum", "max", "concat"])
def test_mirror_face_merges_the_two_features(merge):
    backbone, x = Counting(), torch.randn(3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    out = nf.MirrorFace(backbone, merge)(x)
    assert backbone.calls == 1
    front, mirrored = backbone(x), backbone(torch.flip(x, [3]))
    merged = {
        "sum": front + mirrored,
        "max": front.maximum(mirrored),
        "concat": torch.cat([front, mirrored], 1),
    }
    torch.testing.assert_close(out, merged[merge], rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(out)
    got, expected = (torch.autograd.grad(y, x, upstream)[0] for y in (out, merged[merge]))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_mirror_face_sum_does_not_see_a_mirror():
    net, x = nf.MirrorFace(Counting()), torch.randn(3, 2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x), net(x.flip(3)))
    assert "merge='sum'" in repr(net) and len(list(net.parameters())) == 2


def test_mirror_face_of_no_images():
    assert nf.MirrorFace(Counting(), "concat")(torch.zeros(0, 2, 3, 4, dtype=torch.float64)).shape == (0, 10)


def test_mirror_face_refuses():
    with pytest.raises(ValueError, match="one of sum, max, concat, got 'mean'"):
        nf.MirrorFace(Counting(), "mean")
    backbone = Counting()
    with pytest.raises(ValueError, match=r"4-D \[N, C, H, W\], got shape \[2, 3, 4\]"):
        nf.MirrorFace(backbone)(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="`images` to be a Tensor, got list"):
        nf.MirrorFace(backbone)([1])
    assert backbone.calls == 0
    with pytest.raises(ValueError, match=r"return \[4, ...\], got shape \[\]"):
        nf.MirrorFace(_Returns(torch.zeros(())))(torch.zeros(2, 3, 4, 4))
    with pytest.raises(TypeError, match="got tuple"):
        nf.MirrorFace(_Returns((1,)))(torch.zeros(2, 3, 4, 4))


class _Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value
