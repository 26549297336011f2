"""Checkpoints as other libraries write them, by hand: names, shapes, and what stands beside the head."""

from __future__ import annotations

import argparse
import pathlib
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

import normface_ext as nf
from normface_ext.formats import HeadReport

C, D = 11, 6
ROWS = torch.randn(C, D, generator=torch.Generator().manual_seed(0)) * 3
COLUMNS = ROWS.T.contiguous()
ONE = torch.ones(1)
BACKBONE = {
    "conv1.weight": torch.randn(4, 3, 3, 3), "fc.weight": torch.randn(D, 9), "fc.bias": torch.randn(D),
    "features.weight": torch.ones(D), "features.bias": torch.zeros(D),
    "features.running_mean": torch.zeros(D), "features.running_var": torch.ones(D),
}  # fmt: skip
#: The backbone of AdaFace and FaceX-Zoo ends with a linear layer and a BatchNorm1d of size D.
EMBEDDING = {"layer.0.weight": torch.randn(4, 3, 3, 3), "output.3.weight": torch.randn(D, 9)}


def under(prefix, tensors):
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def optimizer_state(*shapes):
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer.state_dict()


def insightface(rows=ROWS):
    """arcface_torch, train_v2.py with save_all_states: one per rank."""
    return {
        "epoch": 3, "global_step": 700, "state_dict_backbone": OrderedDict(BACKBONE),
        "state_dict_softmax_fc": OrderedDict(weight=rows),
        "state_optimizer": optimizer_state((4, 3), rows.shape),
        "state_lr_scheduler": {"base_lrs": [0.1], "last_epoch": 700, "max_steps": 900, "_step_count": 701},
    }  # fmt: skip


def adaface():
    """A LightningModule with `model` and `head`; hyper-parameters from argparse."""
    head = {"kernel": COLUMNS, "t": torch.zeros(1), "batch_mean": 21 * ONE, "batch_std": 90 * ONE}
    return {
        "epoch": 2, "global_step": 9, "pytorch-lightning_version": "1.4.4",
        "state_dict": OrderedDict(under("model.", EMBEDDING) | under("head.", head)),
        "callbacks": {pathlib.PurePosixPath: {"best": np.float64(0.9), "dirpath": pathlib.Path("a")}},
        "optimizer_states": [optimizer_state((D, C))], "lr_schedulers": [{"gamma": 0.1, "last_epoch": 2}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"head": "adaface", "m": 0.4, "h": 0.333, "s": 48.0, "t_alpha": 0.01, "lr": 0.1,
                             "args": argparse.Namespace(x=1)},
    }  # fmt: skip


def facex_zoo(name, value):
    """conventional_training/train.py: a FaceModel of `backbone` and `head`."""
    state = under("backbone.", EMBEDDING) | {f"head.{name}": value}
    return {"state_dict": OrderedDict(state), "epoch": 4, "batch_id": 2999}


#: what torch.save gets -> format, entry, layout
WRITTEN = {
    "insightface": (insightface(), "insightface", "state_dict_softmax_fc/weight", "[C, D]"),
    "adaface": (adaface(), "adaface", "state_dict/head.kernel", "[D, C]"),
    "adaface head": (
        {"kernel": COLUMNS, "t": ONE, "batch_mean": ONE, "batch_std": ONE}, "adaface", "kernel", "[D, C]",
    ),
    "cvlface": (
        {"partial_fc.weight": ROWS, "partial_fc.batch_mean": ONE, "partial_fc.batch_std": ONE},
        "cvlface", "partial_fc.weight", "[C, D]",
    ),
    "cvlface fc": (
        {"classifier.weight": ROWS, "classifier.batch_mean": ONE, "classifier.batch_std": ONE},
        "cvlface", "classifier.weight", "[C, D]",
    ),
    "facex-zoo arcface": (facex_zoo("weight", COLUMNS), "facex-zoo", "state_dict/head.weight", "[D, C]"),
    "facex-zoo npcface": (facex_zoo("kernel", COLUMNS), "facex-zoo", "state_dict/head.kernel", "[D, C]"),
    "facex-zoo adacos": (facex_zoo("W", ROWS), "facex-zoo", "state_dict/head.W", "[C, D]"),
    "pml": ({"W": COLUMNS}, "pytorch-metric-learning", "W", "[D, C]"),
    "pml in a model": (
        {"trunk.0.weight": torch.randn(D, 5, 1, 1), "loss_func.W": COLUMNS},
        "pytorch-metric-learning", "loss_func.W", "[D, C]",
    ),
    "pml proxies": ({"proxies": ROWS}, "pytorch-metric-learning", "proxies", "[C, D]"),
    "magface": (
        {"epoch": 1, "arch": "iresnet100", "best_prec1": 0,
         "state_dict": under("features.module.", BACKBONE) | {"module.fc.weight": COLUMNS}},
        "magface", "state_dict/module.fc.weight", "[D, C]",
    ),
    "magface in parallel": (
        {"state_dict": under("features.module.", BACKBONE) | {"fc.weight": ROWS}},
        "linear", "state_dict/fc.weight", "[C, D]",
    ),
    "adaface weights alone": (
        under("model.", EMBEDDING) | {"head.kernel": COLUMNS}, "adaface", "head.kernel", "[D, C]",
    ),
    "curricularface": ({"kernel": COLUMNS, "t": ONE}, "kernel", "kernel", "[D, C]"),
    "elasticface": ({"module.kernel": COLUMNS}, "kernel", "module.kernel", "[D, C]"),
    "timm": (
        under("blocks.", EMBEDDING) | {"head.weight": ROWS, "head.bias": torch.zeros(C)},
        "linear", "head.weight", "[C, D]",
    ),
    "timm conv": (
        {"stem.0.weight": torch.randn(4, 3, 3, 3), "head.fc.weight": ROWS, "head.fc.bias": torch.zeros(C)},
        "linear", "head.fc.weight", "[C, D]",
    ),
    "torchvision mobilenet": (
        {"features.0.weight": torch.ones(4, 3, 3, 3), "classifier.1.weight": ROWS, "classifier.1.bias": ONE},
        "linear", "classifier.1.weight", "[C, D]",
    ),
    "torchvision": (
        {"conv1.weight": torch.randn(4, 3, 3, 3), "fc.weight": ROWS, "fc.bias": torch.zeros(C)},
        "linear", "fc.weight", "[C, D]",
    ),
    "linear": (nn.Linear(D, C, bias=False).state_dict() | {"weight": ROWS}, "linear", "weight", "[C, D]"),
    "compiled": ({"_orig_mod.module.fc.weight": ROWS, "_orig_mod.module.fc.bias": torch.zeros(C)},
                 "linear", "_orig_mod.module.fc.weight", "[C, D]"),
}  # fmt: skip


def features(dtype=torch.float32, size=D):
    return torch.randn(5, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def right(loaded, rows=ROWS):
    head, report = loaded
    assert isinstance(head, nf.NormFaceLoss) and isinstance(report, HeadReport)
    assert (head.num_classes, head.in_features) == (report.classes, report.features) == tuple(rows.shape)
    assert torch.equal(head.weight, rows) and head.weight.dtype == report.dtype == rows.dtype
    x = features(rows.dtype, rows.shape[1])
    cosines = nn.functional.linear(*map(nn.functional.normalize, (x, rows)))
    torch.testing.assert_close(head.logits(x), head.scale_value() * cosines)
    assert head.weight.is_contiguous() and head.weight.is_leaf and head.weight.requires_grad
    return head, report
