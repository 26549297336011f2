"""Runs a small case of every kernel, forward and backward: what compute-sanitizer is pointed at.

    python scripts/every_kernel.py [--device cuda]

Sizes are odd on purpose and the results are compared with the reference, so a tool that finds nothing
has still watched the right numbers being made.
"""

from __future__ import annotations

import argparse

import torch

import normface_ext as nf


def compare(name: str, actual: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    error = float((actual - truth).norm() / truth.norm().clamp_min(1e-30))
    if not error <= tolerance:
        raise SystemExit(f"{name}: relative error {error:.2e} above {tolerance:.0e}")


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def run(name: str, ours: object, reference: object, inputs: list[torch.Tensor], tolerance: float) -> None:
    """Values and gradients of `ours` against `reference` on the same inputs in float64 on the CPU."""
    mine, theirs = leaves(*inputs), leaves(*(t.cpu().double() for t in inputs))
    out, truth = ours(*mine), reference(*theirs)  # type: ignore[operator]
    compare(name, out, truth, tolerance)
    weights = torch.randn(truth.shape, dtype=torch.float64)
    (out * weights.to(out)).sum().backward()
    (truth * weights).sum().backward()
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        compare(f"{name}, gradient {index}", a.grad, b.grad, tolerance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    f, r = nf.functional, nf.reference
    labels = torch.randint(101, (17,))
    labels[2:5], labels[6] = 100, -100
    on_device = labels.to(device)
    weights = {"sample_weight": torch.rand(17), "class_weight": torch.rand(101)}
    there = {name: weight.to(device) for name, weight in weights.items()}
    for dtype, tolerance in (
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.float16, 2e-2),
        (torch.bfloat16, 5e-2),
    ):

        def make(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape).to(device, of)

        for p in (1, 2):
            for shape in ((33, 40), (5, 31), (2, 7, 3, 35), (3, 1100)):
                run(
                    f"normalize {dtype} p={p} {shape}",
                    lambda x, p=p: f.normalize(x, 1, p),
                    lambda x, p=p: r.normalize(x, 1, p),
                    [make(*shape)],
                    tolerance,
                )
        wide = torch.promote_types(dtype, torch.float32)
        inputs = [make(17, 40), make(101, 40), torch.tensor(7.0, device=device, dtype=wide)]
        run(f"norm_linear {dtype}", f.norm_linear, r.norm_linear, inputs, tolerance)
        # What plan() makes of the shape: our own products, cuBLAS for rows that tensor cores do not take and
        # for dW of a large batch, chunks, and (16 bits, E too large for the budget) the single sweep.
        for batch, dim, classes, workspace in (
            (17, 40, 101, None),
            (17, 41, 101, None),
            (17, 520, 101, None),
            (1100, 40, 101, None),
            (17, 40, 101, 60_000),
            (17, 40, 20_001, 5_000_000),
        ):
            target = torch.randint(min(classes, 101), (batch,))
            target[2:5], target[6] = 100, -100
            there_too = target.to(device)
            for s in (10.0, 100.0):  # one shift for all, and the largest logit of each row
                plan = nf.plan(batch, dim, classes, dtype, device, workspace=workspace)
                run(
                    f"normface_loss {dtype} N={batch} D={dim} C={classes} s={s}: {plan}",
                    lambda x, w, t, y=there_too, ws=workspace: f.normface_loss(
                        x, w, y, t, margin=nf.ArcFace(0.3), workspace=ws
                    ),
                    lambda x, w, t, y=target: r.normface_loss(x, w, y, t, margin=nf.ArcFace(0.3)),
                    [make(batch, dim), make(classes, dim), torch.tensor(s, device=device, dtype=wide)],
                    tolerance,
                )
                if s == 10.0:
                    run(
                        f"normface_loss {dtype} N={batch} D={dim} C={classes}, a number as scale",
                        lambda x, w, y=there_too, ws=workspace: f.normface_loss(x, w, y, 10.0, workspace=ws),
                        lambda x, w, y=target: r.normface_loss(x, w, y, 10.0),
                        [make(batch, dim), make(classes, dim)],
                        tolerance,
                    )
        run(
            f"normface_loss {dtype}, weighted and smoothed",
            lambda x, w: f.normface_loss(x, w, on_device, 9.0, label_smoothing=0.1, **there),
            lambda x, w: r.normface_loss(x, w, labels, 9.0, label_smoothing=0.1, **weights),
            [make(17, 40), make(101, 40)],
            tolerance,
        )
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran and agreed with the reference")


if __name__ == "__main__":
    main()
