"""Every kernel equals its reference, in Triton's interpreter; ``tests/gpu`` has the larger grid for a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU, kernels are compiled (make gpu)", allow_module_level=True)

from prismserve.kernels import paged_attention
from prismserve.kernels.dispatch import interpreted, use_triton
from prismserve.kernels.paged_attention import plan_batch
from prismserve.kernels.paged_cache import KVFormat
from prismserve.kernels.paged_decode.triton import choose_splits
from tests.kernels import cases

# numpy warns where the interpreter divides or takes a logarithm in lanes that are masked out afterwards, and where it
# computes what a kernel lets wrap around.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (7, 1)])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_decode(heads, kv_heads, width):
    cases.check_decode("cpu", heads, kv_heads, width, [0, 1, 17, 70])


@pytest.mark.parametrize("kv_format", cases.FORMATS)
@pytest.mark.parametrize("splits", [2, 4])
def test_decode_in_parts(kv_format, splits):
    cases.check_decode("cpu", 4, 2, 64, [0, 1, 33, 150], kv_format=kv_format, splits=splits)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (7, 1)])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_prefill(heads, kv_heads, width):
    cases.check_prefill("cpu", heads, kv_heads, width, [(5, 5), (0, 3), (1, 40), (33, 70), (0, 0)])


@pytest.mark.parametrize("kv_format", list(KVFormat))
@pytest.mark.parametrize("width", [64, 80])
def test_prefill_over_a_quantised_cache(kv_format, width):
    cases.check_prefill("cpu", 4, 2, width, [(5, 5), (20, 70)], kv_format=kv_format)


@pytest.mark.parametrize("kv_format", cases.FORMATS)
@pytest.mark.parametrize("known", [False, True])
def test_scores_of_last_rows_windows_and_chosen_rows(kv_format, known):
    positions = [[40], range(62, 70), [], [3, 90, 0, 17], [0]]
    cases.check_scores("cpu", 6, 2, 80, positions, kv_format=kv_format, known=known)


@pytest.mark.parametrize("kv_format", cases.FORMATS)
def test_rotary_write_and_write(kv_format):
    cases.check_rotary_write("cpu", 3, 1, 80, 4, kv_format=kv_format)
    cases.check_write("cpu", 2, 64, 3, kv_format=kv_format)
    cases.check_write("cpu", 2, 64, 0, kv_format=kv_format)


@pytest.mark.parametrize(("shape", "group_tokens"), [((0, 2, 64), 4), ((1, 1, 80), 0), ((37, 2, 128), 16)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_quantisation(shape, group_tokens, scale_dtype):
    cases.check_quantised("cpu", shape, group_tokens, scale_dtype=scale_dtype)


@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 80), (5, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_elementwise(rows, width, dtype):
    cases.check_elementwise("cpu", rows, width, dtype)


def test_a_row_wider_than_the_registers_is_read_twice(monkeypatch):
    from prismserve.kernels.rms_norm import triton

    monkeypatch.setattr(triton, "_REGISTERS_MAX", 64)
    cases.check_elementwise("cpu", 3, 150)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float8_e4m3fn])
def test_block_copy(dtype):
    cases.check_block_copy("cpu", dtype)


@pytest.mark.parametrize(("tokens", "keep"), [(1, 1), (7, 3), (100, 100), (50, 0), (5000, 700)])
def test_top_k(tokens, keep):
    cases.check_top_k("cpu", 2, tokens, keep)


def test_a_step_of_mixed_sequences_through_the_dispatcher():
    q_lens, kv_lens = [1, 5, 0, 1, 7], [30, 5, 3, 1, 40]
    layer = cases.filled_layer(None, (16, 16, 2, 64), torch.float32, "cpu")
    tables = cases.scattered_tables(kv_lens, 16, 16)
    q = torch.randn(14, 4, 64)
    plain = plan_batch(tables, q_lens, kv_lens, 16)
    expected, expected_lse = paged_attention.attend_with_lse(q, layer, plain, 0.125)
    with interpreted():
        assert use_triton(q)
        planned = plan_batch(tables, q_lens, kv_lens, 16)
        got, got_lse = paged_attention.attend_with_lse(q, layer, planned, 0.125)
        cases.close(paged_attention.attend(q, layer, planned, 0.125), expected)
    assert not use_triton(q)
    cases.close(got, expected)
    cases.close(got_lse, expected_lse)
    with pytest.raises(ValueError, match="another implementation"):
        paged_attention.reference.attend(q, layer, planned, 0.125)


def test_splits_fill_the_device_but_are_never_short():
    assert choose_splits(1, 100_000, 132) == 64
    assert choose_splits(1024, 100_000, 132) == 1
    assert choose_splits(8, 600, 132) == 1
    assert choose_splits(8, 4096, 132) == 8
