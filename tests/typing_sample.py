# pyright: strict
"""What a user's type checker makes of the public names: mypy and pyright read this file, strictly, and pytest
runs it (test_build.py)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import assert_type

import normface_ext as nf
from normface_ext import evaluation


def heads(x: Tensor, labels: Tensor) -> None:
    head = nf.NormFaceLoss(8, 5, margin=nf.ArcFace(0.5), sub_centers=2)
    assert_type(head, nf.NormFaceLoss)
    assert_type(head.in_features, int)
    assert_type(head.predict(x), Tensor)
    assert_type(head.logits(x), Tensor)
    assert_type(nf.NormFaceLoss.preset("cosface", 8, 5), nf.NormFaceLoss)
    assert_type(nf.NormLinear(8, 5).out_features, int)
    assert_type(nf.plan(4, 8, 5), nf.Plan)
    assert_type(nf.plan(4, 8, 5).product, str)
    assert_type(nf.build_info(), dict[str, object])


def functions(x: Tensor, weight: Tensor, labels: Tensor) -> None:
    assert_type(nf.functional.normalize(x), Tensor)
    assert_type(nf.functional.normface_loss(x, weight, labels, 16.0), Tensor)
    assert_type(nf.functional.inner_distance(x, weight), Tensor)
    assert_type(nf.theory.loss_lower_bound(5, 16.0), float)


def protocols() -> None:
    same = np.arange(20) % 2 == 0
    pairs = evaluation.Pairs.in_folds(np.arange(20), np.arange(20, 40), same, folds=2)
    assert_type(pairs, evaluation.Pairs)
    features = np.random.default_rng(0).normal(size=(40, 8))
    assert_type(evaluation.lfw_protocol(features, pairs), evaluation.LfwResult)
    assert_type(evaluation.fold_protocol(features, pairs), evaluation.FoldResult)


def main() -> None:
    x, weight, labels = torch.randn(4, 8), torch.randn(5, 8), torch.arange(4)
    heads(x, labels)
    functions(x, weight, labels)
    protocols()
