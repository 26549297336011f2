"""What the processes of tests/ranks.py do for test_second_derivatives.py."""

import itertools

import torch
import torch.distributed as dist

import normface_ext.distributed as nfd

CLASSES, BATCH, DIM = 6, 4, 5
#: name -> (x, weight, scale, labels, shard) -> number. The sentence begins with the first word of the name.
LOSSES = {
    "normface_loss": lambda x, w, s, y, shard: nfd.normface_loss(x, w, y, s, shard),
    "normface_loss, each row": lambda x, w, s, y, shard: nfd.normface_loss(
        x, w, y, s, shard, reduction="none"
    ).sum(),
    "normface_loss, sampled": lambda x, w, s, y, shard: nfd.normface_loss(
        x, w, y, s, shard, sample=nfd.ClassSampler(0.5)
    ),
    "c_contrastive_loss": lambda x, w, s, y, shard: nfd.c_contrastive_loss(x, w, y, shard, neg_margin=1.9),
    "c_triplet_loss": lambda x, w, s, y, shard: nfd.c_triplet_loss(x, w, y, shard),
}
LEAVES = ("x", "weight", "scale")
#: What needs a gradient, of which gradient the penalty is, and what that is differentiated by.
QUESTIONS = [
    (trained, penalised, asked)
    for count in (1, 2, 3)
    for trained in itertools.combinations(LEAVES, count)
    for penalised, asked in itertools.product(trained, repeat=2)
]


def penalties(rank, world):
    """{(loss, question): what was raised, or None}, for every loss that has what is asked of it."""
    shard = nfd.ClassShard.of(CLASSES, dist.group.WORLD)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(CLASSES, DIM, generator=generator)[shard.first : shard.first + shard.count]
    x = torch.randn(world, BATCH, DIM, generator=generator)[rank]
    labels = torch.randint(CLASSES, (world, BATCH), generator=generator)[rank]
    said = {}
    for name, question in itertools.product(LOSSES, QUESTIONS):
        trained, penalised, asked = question
        if "scale" in trained and not name.startswith("normface_loss"):
            continue
        given = {"x": x.clone(), "weight": weight.clone(), "scale": torch.tensor(4.0)}
        for key in trained:
            given[key].requires_grad_()
        loss = LOSSES[name](*given.values(), labels, shard)
        (first,) = torch.autograd.grad(loss, given[penalised], create_graph=True)
        penalty = first.to_dense().square().sum()
        said[name, question] = None
        try:
            torch.autograd.grad(loss + penalty, given[asked])
        except RuntimeError as error:
            said[name, question] = str(error)
    return said
