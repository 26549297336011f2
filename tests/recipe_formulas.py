"""The recipes' losses as their papers write them, in float64, class by class and row by row.

A formula takes x [N, D], weight [C, D] and labels [N] of rows that all count, and returns the losses of the
rows [N]; `proxy_anchor`, which has none, returns the loss. Nothing here comes from the package.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def cosines(x, weight):
    return F.normalize(x, eps=0) @ F.normalize(weight, eps=0).T


def per_row(x, labels, loss):
    rows = [loss(i, int(labels[i])) for i in range(len(labels))]
    return torch.stack(rows) if rows else x.sum(1)


def softmax_loss(logits, labels):
    return per_row(logits, labels, lambda i, y: logits[i].logsumexp(0) - logits[i, y])


def norm_softmax(x, weight, labels, temperature=0.05):
    return softmax_loss(cosines(x, weight) / temperature, labels)


def ldam(x, weight, labels, counts, scale=30.0, max_m=0.5):
    largest = max(n ** (-1 / 4) for n in counts)
    logits = cosines(x, weight)
    moved = [
        scale
        * torch.stack([c - (j == y) * max_m * counts[j] ** (-1 / 4) / largest for j, c in enumerate(row)])
        for row, y in zip(logits, labels.tolist(), strict=True)
    ]
    return softmax_loss(torch.stack(moved) if moved else logits, labels)


def effective_number_weights(counts, beta=0.9999):
    rarity = [(1 - beta) / (1 - beta**n) for n in counts]
    return [len(counts) * r / sum(rarity) for r in rarity]


def kappaface(x, weight, labels, margins, scale=64.0):
    cosine = cosines(x, weight)

    def loss(i, y):
        psi = torch.cos(torch.acos(cosine[i, y].clamp(-1, 1)) + margins[y])
        logits = scale * torch.stack([psi if j == y else c for j, c in enumerate(cosine[i])])
        return logits.logsumexp(0) - logits[y]

    return per_row(x, labels, loss)


def kappa_margins(features, labels, counts, m=0.8, T=0.4, gamma=0.7):
    """Of classes that all have features, no two of them equal."""
    dim, kappa = features.shape[1], []
    for j in range(len(counts)):
        own = F.normalize(features[labels == j])
        r = float(own.mean(0).norm())
        kappa.append(r * (dim - r**2) / (1 - r**2))
    z = (torch.tensor(kappa, dtype=torch.float64) - sum(kappa) / len(kappa)) / torch.tensor(
        kappa, dtype=torch.float64
    ).std()
    rare = [(math.cos(math.pi * n / (1.05 * max(counts))) + 1) / 2 for n in counts]
    return [
        m * (gamma * (1 - 1 / (1 + math.exp(-T * float(zj)))) + (1 - gamma) * v)
        for zj, v in zip(z, rare, strict=True)
    ]


def adacos_scale(x, weight, labels, before):
    """The scale after a batch."""
    cosine = cosines(x, weight).detach()
    sums = [
        sum(math.exp(before * float(c)) for j, c in enumerate(row) if j != y)
        for row, y in zip(cosine, labels.tolist(), strict=True)
    ]
    angles = sorted(
        math.acos(max(-1.0, min(1.0, float(cosine[i, y])))) for i, y in enumerate(labels.tolist())
    )
    median = angles[(len(angles) - 1) // 2]
    return math.log(sum(sums) / len(sums)) / math.cos(min(math.pi / 4, median))


def adacos(x, weight, labels, dynamic=True):
    scale = math.sqrt(2) * math.log(len(weight) - 1)
    if dynamic and len(labels):
        scale = adacos_scale(x, weight, labels, scale)
    return softmax_loss(scale * cosines(x, weight), labels)


def squared_distances(x, weight):
    return (F.normalize(x, eps=0)[:, None] - F.normalize(weight, eps=0)[None]).square().sum(2)


def proxy_nca(x, weight, labels, scale=1.0, target_in_the_sum=False):
    distance = scale * squared_distances(x, weight)

    def loss(i, y):
        kept = [(-d).exp() for j, d in enumerate(distance[i]) if target_in_the_sum or j != y]
        return distance[i, y] + torch.stack(kept).sum().log()

    return per_row(x, labels, loss)


def p2sgrad(x, weight, labels, factor=0.5):
    cosine = cosines(x, weight)
    error = cosine - F.one_hot(labels, len(weight)).to(cosine.dtype)
    return factor * error.square().sum(1)


def proxy_anchor(x, weight, labels, copies=None, alpha=32.0, delta=0.1):
    """`copies`: how many rows each row stands for."""
    cosine = cosines(x, weight)
    copies = torch.ones(len(x), dtype=torch.float64) if copies is None else copies
    pulled, pushed, present = x.sum() * 0, x.sum() * 0, 0
    for j in range(len(weight)):
        own = labels == j
        if own.any():
            present += 1
            pulled = pulled + (1 + (copies[own] * (-alpha * (cosine[own, j] - delta)).exp()).sum()).log()
        pushed = pushed + (1 + (copies[~own] * (alpha * (cosine[~own, j] + delta)).exp()).sum()).log()
    return pulled / max(present, 1) + pushed / len(weight)


def soft_triple(x, weight, labels, centers=10, la=20.0, gamma=0.1, margin=0.01, tau=0.2):
    units = F.normalize(weight, eps=0)
    classes = len(weight) // centers
    cosine = F.normalize(x, eps=0) @ units.T
    of_class = []
    for j in range(classes):
        own = cosine[:, j * centers : (j + 1) * centers]
        weights = (own / gamma).exp()
        of_class.append((weights * own).sum(1) / weights.sum(1))
    logits = la * torch.stack(of_class, 1)
    logits = logits - la * margin * F.one_hot(labels, classes).to(logits.dtype)
    spread = weight.sum() * 0
    for j in range(classes):
        for k in range(centers):
            for other in range(k + 1, centers):
                product = (units[j * centers + k] * units[j * centers + other]).sum()
                spread = spread + (2 + 1e-5 - 2 * product).sqrt()
    pairs = classes * centers * (centers - 1)
    return softmax_loss(logits, labels) + (tau * spread / pairs if pairs else 0)


def uniface(x, weight, labels, bias=None, scale=64.0, margin=0.4, negative_weight=1.0):
    cosine = cosines(x, weight)
    b = math.log(10 * len(weight)) if bias is None else bias

    def loss(i, y):
        total = softplus(b - scale * (cosine[i, y] - margin))
        for j, c in enumerate(cosine[i]):
            if j != y:
                total = total + negative_weight * softplus(scale * c - b)
        return total

    return per_row(x, labels, loss)


def softplus(z):
    return z.clamp(min=0) + (-z.abs()).exp().log1p()
