"""The emulation of Hopper can say no: as tests/test_emulation.py, for emulation/faults_hopper.cu."""

from __future__ import annotations

import pytest
import torch
from emulation import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"{build.unavailable()}")


def faults():
    return build.load("faults_hopper")


def factors(m: int, n: int, k: int, dtype: torch.dtype, turned: tuple[bool, bool] = (False, False)):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, k, generator=generator).to(dtype) for size in (m, n))
    return a.T.contiguous() if turned[0] else a, b.T.contiguous() if turned[1] else b


def check(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, turned=(False, False)) -> None:
    if a.dtype == torch.float32:  # what the tensor core reads of it
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    a, b = (x.double().T if t else x.double() for x, t in zip((a, b), turned))
    bound = a.shape[1] * 2**-24 * (a.abs() @ b.abs().T) + 1e-30
    assert ((out.double() - a @ b.T).abs() <= bound).all()


@pytest.mark.parametrize(
    ("dtype", "columns"),
    [
        (torch.bfloat16, 64),
        (torch.bfloat16, 192),
        (torch.bfloat16, 256),
        (torch.float16, 128),
        (torch.float32, 64),
    ],
)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("in_registers", [False, True])
def test_products(dtype, columns, turned, in_registers) -> None:
    if (dtype == torch.float32 and any(turned)) or (in_registers and turned[0]):
        pytest.skip("no such instruction")
    a, b = factors(136, 264, 200, dtype, turned)
    check(faults().product(a, b, *turned, in_registers, columns), a, b, turned)
