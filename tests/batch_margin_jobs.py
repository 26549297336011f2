"""What ranks do in the tests of margins that look at the batch (tests/ranks.py)."""

import torch

import normface_ext as nf

NORMS = [[10.0, 14.0, 31.0], [55.0], []]


def adaface_state(rank, world, sync):
    margin = nf.AdaFace(t_alpha=0.25, sync=sync)
    x = torch.zeros(len(NORMS[rank]), 3, dtype=torch.float64)
    x[:, 0] = torch.tensor(NORMS[rank])
    labels = torch.zeros(len(x)).long()
    nf.functional.normface_loss(x, torch.eye(3, dtype=torch.float64), labels, 16.0, margin=margin)
    return float(margin.mean), float(margin.std)
