"""What ranks do in the tests of margins that look at the batch (tests/ranks.py)."""

import torch
from dense_head import problem
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import normface_ext as nf
from normface_ext import distributed as nfd

NORMS = [[10.0, 14.0, 31.0], [55.0], []]


def adaface_state(rank, world, sync):
    margin = nf.AdaFace(t_alpha=0.25, sync=sync)
    x = torch.zeros(len(NORMS[rank]), 3, dtype=torch.float64)
    x[:, 0] = torch.tensor(NORMS[rank])
    labels = torch.zeros(len(x)).long()
    nf.functional.normface_loss(x, torch.eye(3, dtype=torch.float64), labels, 16.0, margin=margin)
    return float(margin.mean), float(margin.std)


def step(rank, world, make, options, straight, backbone, weights):
    """The class-parallel head over rows of which rank 0 has none: (loss, dx, dweight, state)."""
    x, weight, labels = problem()
    mine = slice(len(x) * (rank * (rank - 1) // 2) // (world * (world - 1) // 2), None)
    mine = slice(mine.start, len(x) * (rank * (rank + 1) // 2) // (world * (world - 1) // 2))
    head = nf.NormFaceLoss(
        16, 7, scale=16.0, margin=make(), margin_gradient=straight, dtype=torch.float64, **options
    )
    with torch.no_grad():
        head.weight.copy_(weight)
    head = nfd.shard_head(head, init_device_mesh("cpu", (world,)), backbone_gradients=backbone)
    features = x[mine].clone().requires_grad_()
    loss = head(features, labels[mine], None if weights is None else weights[mine])
    upstream = torch.linspace(0.5, 1.5, len(x), dtype=torch.float64)
    loss.backward(upstream[mine] if loss.dim() else upstream[0])
    state = [float(b) for b in head.margin.buffers()]
    return loss.detach(), features.grad, head.weight.grad.full_tensor(), state


def draws(rank, world):
    """Ranks whose generators differ, ElasticFace: the loss of each."""
    torch.manual_seed(rank)
    x, weight, labels = problem()
    head = nf.NormFaceLoss(16, 7, scale=16.0, margin=nf.ElasticArcFace(std=0.3), dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
    head = nfd.shard_head(head, init_device_mesh("cpu", (world,)))
    return head(x[rank::world], labels[rank::world]).detach()


def sentence(rank, world):
    x, _, labels = problem()
    head = nf.NormFaceLoss(16, 7, margin=nf.ElasticArcFace(plus=True), dtype=torch.float64)
    head = nfd.shard_head(head, init_device_mesh("cpu", (world,)))
    try:
        head(x, labels)
    except ValueError as error:
        return str(error)


def passes(rank, world, dtype, again):
    """Two forwards before one backward, run again in it or not: losses, gradients, state."""
    torch.manual_seed(0)
    head = nf.NormFaceLoss(16, 7, scale=16.0, margin=nf.AdaFace(t_alpha=0.25), dtype=torch.float64)
    head = nfd.shard_head(head, init_device_mesh("cpu", (world,)))
    data = [
        ((problem(seed=i)[0] * (1 + 4 * i)).requires_grad_(), problem(seed=i)[2].to(dtype)) for i in (0, 1)
    ]
    losses = [checkpoint(head, *given, use_reentrant=False) if again else head(*given) for given in data]
    sum(losses).backward()
    state = [b.detach().clone() for b in head.margin.buffers()]
    return [*(loss.detach() for loss in losses), *(x.grad for x, _ in data), *state]


class Says(nf.BatchMargin):
    def __init__(self, found, more=None):
        super().__init__()
        self.found, self.more = found, more

    def of(self, rows):
        return self.found

    def regularizer(self, rows):
        return self.more


def wrong_margins(rank, world):
    """What is said of margins that return something else."""
    x, _, labels = problem()
    sentences = []
    for margin in (Says(None), Says(nf.CosFace(0.3), torch.ones(1))):
        head = nf.NormFaceLoss(16, 7, margin=margin, dtype=torch.float64)
        head = nfd.shard_head(head, init_device_mesh("cpu", (world,)))
        try:
            head(x, labels)
        except (TypeError, ValueError) as error:
            sentences.append(str(error))
    return sentences
