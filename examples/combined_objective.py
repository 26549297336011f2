"""The paper's combined objective, softmax + 0.01 C-contrastive, on scikit-learn's digits, in seconds.

    python examples/combined_objective.py

NormFace's best result on LFW (99.22 %) trains one network with two heads (section 4): the scaled softmax,
which tells classes apart, and a little of the contrastive loss over class agents, which asks for what
verification needs, namely small distances within a class and large ones between classes. Each head has
agents of its own, as in the released nets.

The same small network is trained with the softmax alone, with the C-triplet loss alone and with the
combination, from the same seed. Printed for each: the accuracy of the nearest agent on test images, the
mean squared distance of a feature to its own agent and to the nearest other one, and their ratio. With ten
easy classes every row is right nearly always; the distances are where the losses differ.
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import normface_ext as nf

CLASSES, FEATURES, BATCH, CONTRASTIVE_WEIGHT = 10, 16, 64, 0.01


class CombinedObjective(nn.Module):
    """softmax + 0.01 C-contrastive, each over its own agents."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nf.NormFaceLoss(FEATURES, CLASSES)
        self.contrastive = nf.CContrastiveLoss(FEATURES, CLASSES, neg_margin=1.0)

    @property
    def weight(self) -> Tensor:
        return self.softmax.weight

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.softmax(features, labels) + CONTRASTIVE_WEIGHT * self.contrastive(features, labels)


HEADS = {
    "softmax": lambda: nf.NormFaceLoss(FEATURES, CLASSES),
    "C-triplet": lambda: nf.CTripletLoss(FEATURES, CLASSES, margin=0.8),
    "softmax + 0.01 C-contrastive": CombinedObjective,
}


def train(
    name: str, images: Tensor, labels: Tensor, epochs: int, seed: int
) -> tuple[nn.Module, nn.Module, float]:
    torch.manual_seed(seed)  # the backbone is drawn first, so all start from the same one
    backbone = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, FEATURES))
    head = HEADS[name]()
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=3e-3)
    order = torch.Generator().manual_seed(seed)
    mean = 0.0
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(labels), generator=order).split(BATCH):
            loss = head(backbone(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(batch)
        mean = total / len(labels)
    return backbone, head, mean


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a second thread brings nothing to a network this small

    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train_rows, test_rows = train_test_split(
        range(len(labels)), test_size=0.3, random_state=options.seed, stratify=labels
    )
    print(f"{'objective':30} final loss  accuracy  to own agent  to nearest other  ratio  seconds")
    for name in HEADS:
        start = time.perf_counter()
        backbone, head, loss = train(
            name, images[train_rows], labels[train_rows], options.epochs, options.seed
        )
        with torch.no_grad():
            features = nf.functional.normalize(backbone(images[test_rows]))
            distances = nf.functional.inner_distance(features, head.weight, normalize=True)
        own = labels[test_rows][:, None]
        right = (distances.argmin(1, keepdim=True) == own).float().mean()
        near = distances.gather(1, own).mean()
        far = distances.scatter(1, own, torch.inf).min(1).values.mean()
        print(
            f"{name:30} {loss:10.4f}  {right:8.2%}  {near:12.4f}  {far:16.4f}  {far / near:5.1f}"
            f"  {time.perf_counter() - start:7.1f}"
        )


if __name__ == "__main__":
    main()
