from __future__ import annotations

import pytest
import torch

from prismserve.kernels.dispatch import use_native_on, without_native
from prismserve.kernels.linear import Norm, linear, pack, packable, rows_of
from prismserve.kernels.linear.reference import unpack

needs_native = pytest.mark.skipif(not use_native_on(torch.device("cpu")), reason="no C++ compiler on this machine")
pytestmark = needs_native

SHAPES = [(48, 24), (33, 40), (896, 130), (7, 5), (16, 1), (64, 300)]
DTYPES = [torch.float32, torch.bfloat16]


def packed(columns, depth, dtype):
    weight = (torch.randn(columns, depth) * depth**-0.5).to(dtype)
    arranged = weight.clone()
    pack(arranged)
    return weight, arranged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
def test_packing_loses_nothing(columns, depth, dtype):
    weight, arranged = packed(columns, depth, dtype)
    assert torch.equal(unpack(arranged), weight)
    ids = torch.randint(0, columns, (3, 4))
    assert torch.equal(rows_of(arranged, ids, packed=True, dtype=torch.float32), weight[ids].float())
    with without_native():
        assert torch.equal(rows_of(arranged, ids, packed=True, dtype=torch.float32), weight[ids].float())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
def test_native_products_equal_plain_ones_and_rows_do_not_depend_on_their_company(
    columns, depth, dtype, gated, threads
):
    if gated and columns % 2:
        pytest.skip("a gate needs an even number of columns")
    weight, arranged = packed(columns, depth, dtype)
    x, bias, gain = torch.randn(150, depth), torch.randn(columns), torch.rand(depth)
    residual = torch.randn(150, columns // 2 if gated else columns)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()
    exact = exact @ weight.double().T + bias.double()
    if gated:
        gate, up = exact.chunk(2, dim=-1)
        exact = torch.nn.functional.silu(gate) * up
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:

        def product(rows):
            return linear(
                x[rows],
                arranged,
                bias,
                packed=True,
                norm=Norm(gain, 1e-6),
                residual=residual[rows],
                gated=gated,
            )

        got = product(slice(None))
        torch.testing.assert_close(got.double(), exact + residual.double(), rtol=1e-5, atol=2e-5)
        with without_native():
            torch.testing.assert_close(product(slice(None)), got, rtol=1e-5, atol=2e-5)
        for rows in (slice(0, 1), slice(3, 5), slice(7, 10), slice(0, 7), slice(100, 116), slice(49, 150)):
            assert torch.equal(product(rows), got[rows])
    finally:
        torch.set_num_threads(before)


def test_no_rows_and_narrow_activations():
    weight, arranged = packed(48, 24, torch.bfloat16)
    assert linear(torch.zeros(0, 24), arranged, packed=True).shape == (0, 48)
    x = torch.randn(2, 3, 24).bfloat16()
    got = linear(x, arranged, packed=True)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.float(), x.float() @ weight.float().T, rtol=1e-2, atol=1e-2)


def test_a_row_that_does_not_exist_is_refused():
    _, arranged = packed(48, 24, torch.bfloat16)
    for wrong in (-1, 48):
        with pytest.raises(IndexError, match="48"):
            rows_of(arranged, torch.tensor([0, wrong]), packed=True, dtype=torch.float32)


def test_what_cannot_be_packed_is_left_alone():
    assert not packable(torch.zeros(4, 4, dtype=torch.float16))
    assert not packable(torch.zeros(4, 4).t()[:, :2])
    with without_native():
        assert not packable(torch.zeros(4, 4))
