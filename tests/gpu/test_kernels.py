"""Every kernel equals its reference on a GPU, over a larger grid than the interpreter has time for."""

from __future__ import annotations

import pytest
import torch

from prismserve.kernels import paged_prefill
from prismserve.kernels.paged_prefill import flash, plan_ragged
from tests.kernels import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RATIOS = [(8, 8), (8, 2), (14, 2), (32, 8), (7, 1)]
WIDTHS = [64, 80, 128, 256]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KV_LENS = [0, 1, 15, 16, 17, 500, 3001]
CHUNKS = [(1, 1), (0, 5), (17, 17), (300, 300), (129, 1000), (1, 400), (0, 0)]


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton")


@pytest.mark.parametrize("kv_format", cases.FORMATS)
@pytest.mark.parametrize(("heads", "kv_heads"), RATIOS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(heads, kv_heads, width, dtype, kv_format):
    for splits in (1, 8, None):
        cases.check_decode("cuda", heads, kv_heads, width, KV_LENS, kv_format=kv_format, splits=splits, dtype=dtype)
    cases.check_prefill("cuda", heads, kv_heads, width, CHUNKS, kv_format=kv_format, dtype=dtype)


@pytest.mark.parametrize("kv_format", cases.FORMATS)
@pytest.mark.parametrize(("heads", "kv_heads"), RATIOS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(heads, kv_heads, width, dtype, kv_format):
    positions = [[4000], range(968, 1000), [], [3, 90, 0, 17], [0]]
    for known in (False, True):
        cases.check_scores("cuda", heads, kv_heads, width, positions, kv_format=kv_format, known=known, dtype=dtype)


@pytest.mark.parametrize("kv_format", cases.FORMATS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes(width, dtype, kv_format):
    cases.check_rotary_write("cuda", 14, 2, width, 29, kv_format=kv_format, dtype=dtype)
    cases.check_write("cuda", 2, width, 29, kv_format=kv_format, dtype=dtype)


@pytest.mark.parametrize("shape", [(0, 2, 64), (1, 1, 80), (333, 8, 128), (64, 3, 256)])
@pytest.mark.parametrize("group_tokens", [0, 32, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantisation(shape, group_tokens, dtype):
    cases.check_quantised("cuda", shape, group_tokens, dtype)


@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 80), (77, 896), (5, 4096), (3, 20000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise(rows, width, dtype):
    cases.check_elementwise("cuda", rows, width, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
def test_block_copy(dtype):
    cases.check_block_copy("cuda", dtype)


@pytest.mark.parametrize(("heads", "tokens", "keep"), [(1, 1, 1), (8, 576, 64), (32, 32_768, 1024), (2, 5000, 5000)])
def test_top_k(heads, tokens, keep):
    cases.check_top_k("cuda", heads, tokens, keep)


def test_flash_attention_equals_the_reference():
    pytest.importorskip("flash_attn")
    layer = cases.filled_layer(None, (80, 16, 2, 64), torch.bfloat16, "cuda")
    lengths = [(300, 300), (129, 700)]
    batch = plan_ragged(
        cases.scattered_tables([kv for _, kv in lengths], 16, 80), [0, 300], [300, 129], [300, 700], 16, "cuda"
    )
    q = torch.randn(429, 8, 64, device="cuda", dtype=torch.bfloat16)
    assert flash.usable(q, layer)
    out, lse = paged_prefill.paged_prefill(q, layer, batch, 0.125, with_lse=True)
    expected, expected_lse = paged_prefill.reference.paged_prefill(q, layer, batch, 0.125, with_lse=True)
    cases.close(out, expected, torch.bfloat16)
    cases.close(lse, expected_lse, torch.bfloat16)
