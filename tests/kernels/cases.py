"""One comparison per op of its Triton kernel with its reference, for the interpreter and for a GPU alike."""

from __future__ import annotations

import random

import torch

from prismserve.kernels.paged_cache import KVFormat, new_quantised_layer, read_blocks
from prismserve.kernels.paged_cache import reference as cache_reference
from prismserve.kernels.paged_prefill import plan_ragged
from prismserve.kernels.rotary import rotary_angles
from prismserve.kernels.score_rows import plan_rows

FORMATS = (None, *KVFormat)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(got, expected, dtype=torch.float32, atol=None):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    atol = TOLERANCE[dtype] if atol is None else atol
    torch.testing.assert_close(got.float(), expected.float(), rtol=atol, atol=atol)


def empty_layer(kv_format, shape, dtype, device):
    """A layer of [groups, block_tokens, kv_heads, d] that is a strided view into a cache of two layers."""
    groups, block_tokens, kv_heads, width = shape
    if kv_format is None:
        return torch.zeros(groups, 2, 2, block_tokens, kv_heads, width, dtype=dtype, device=device)[:, 1]
    return new_quantised_layer(kv_format, shape, device=device)


def filled_layer(kv_format, shape, dtype, device):
    layer = empty_layer(kv_format, shape, dtype, device)
    slots = torch.arange(shape[0] * shape[1], device=device)
    keys, values = torch.randn(2, slots.shape[0], *shape[2:], device=device).to(dtype)
    cache_reference.write_kv(layer, slots, keys, values)
    return layer


def scattered_tables(kv_lens, block_tokens, groups):
    free = list(range(1, groups))
    random.shuffle(free)
    return [[free.pop() for _ in range(-(-length // block_tokens))] for length in kv_lens]


def check_decode(device, heads, kv_heads, width, kv_lens, *, kv_format=None, splits=1, dtype=torch.float32):
    from prismserve.kernels.paged_decode import reference, triton

    block_tokens = 16
    groups = 2 + sum(-(-length // block_tokens) for length in kv_lens)
    layer = filled_layer(kv_format, (groups, block_tokens, kv_heads, width), dtype, device)
    tables = scattered_tables(kv_lens, block_tokens, groups)
    batch = plan_ragged(tables, range(len(kv_lens)), [1] * len(kv_lens), kv_lens, block_tokens, device)
    q = torch.randn(len(kv_lens), heads, width, device=device).to(dtype)
    args = (q, layer, batch.tables, batch.kv_lens, width**-0.5)
    out, lse = triton.paged_decode(*args, with_lse=True, splits=splits)
    expected, expected_lse = reference.paged_decode(*args, with_lse=True)
    close(out, expected, dtype)
    close(lse, expected_lse, dtype)
    assert triton.paged_decode(*args, splits=splits)[1] is None


def check_prefill(device, heads, kv_heads, width, lengths, *, kv_format=None, dtype=torch.float32):
    """``lengths`` are (query rows, cached tokens)."""
    from prismserve.kernels.paged_prefill import reference, triton

    block_tokens = 16
    q_lens, kv_lens = [q for q, _ in lengths], [kv for _, kv in lengths]
    groups = 2 + sum(-(-length // block_tokens) for length in kv_lens)
    layer = filled_layer(kv_format, (groups, block_tokens, kv_heads, width), dtype, device)
    tables = scattered_tables(kv_lens, block_tokens, groups)
    starts = [sum(q_lens[:index]) for index in range(len(q_lens))]
    batch = plan_ragged(tables, starts, q_lens, kv_lens, block_tokens, device)
    # The queries are a view of a fused projection, as they are in the decoder.
    q = torch.randn(sum(q_lens), heads + kv_heads, width, device=device).to(dtype)[:, :heads]
    out, lse = triton.paged_prefill(q, layer, batch, width**-0.5, with_lse=True)
    expected, expected_lse = reference.paged_prefill(q, layer, batch, width**-0.5, with_lse=True)
    close(out, expected, dtype)
    close(lse, expected_lse, dtype)


def check_scores(device, heads, kv_heads, width, positions, *, kv_format=None, known=False, dtype=torch.float32):
    from prismserve.kernels.score_rows import reference, triton

    block_tokens = 16
    lengths = [max(rows, default=0) + 1 for rows in positions]
    groups = 2 + sum(-(-length // block_tokens) for length in lengths)
    layer = filled_layer(kv_format, (groups, block_tokens, kv_heads, width), dtype, device)
    batch = plan_rows(scattered_tables(lengths, block_tokens, groups), positions, block_tokens, device)
    q = torch.randn(sum(map(len, positions)), heads, width, device=device).to(dtype)
    expected, expected_lse = reference.score_rows(q, layer, batch, width**-0.5)
    lse = expected_lse if known else None
    got, got_lse = triton.score_rows(q, layer, batch, width**-0.5, lse=lse)
    close(got, expected, dtype)
    close(got_lse, expected_lse, dtype)


def check_rotary_write(device, heads, kv_heads, width, tokens, *, kv_format=None, dtype=torch.float32):
    from prismserve.kernels.rotary_write import reference, triton

    shape = (4, 8, kv_heads, width)
    expected, got = (empty_layer(kv_format, shape, dtype, device) for _ in range(2))
    slots = torch.randperm(32)[:tokens].to(device)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, width, device=device).to(dtype)
    parts = qkv.split((heads, kv_heads, kv_heads), dim=1)
    angles = rotary_angles(torch.arange(tokens, device=device) * 7, torch.rand(width // 2, device=device))
    q = triton.rotary_write(parts, *angles, got, slots)
    close(q, reference.rotary_write(parts, *angles, expected, slots), dtype)
    compare_layers(got, expected, kv_format, dtype)


def check_write(device, kv_heads, width, tokens, *, kv_format=None, dtype=torch.float32):
    from prismserve.kernels.paged_cache import triton

    expected, got = (empty_layer(kv_format, (4, 8, kv_heads, width), dtype, device) for _ in range(2))
    slots = torch.randperm(32)[:tokens].to(device)
    keys, values = torch.randn(2, tokens, kv_heads, width, device=device).to(dtype)
    triton.write_kv(got, slots, keys, values)
    cache_reference.write_kv(expected, slots, keys, values)
    compare_layers(got, expected, kv_format, dtype)


def compare_layers(got, expected, kv_format, dtype):
    # A rotated key may differ in its last bit and fall to the neighbouring code.
    step = {None: 0.0, KVFormat.INT8: 0.06, KVFormat.INT4: 0.7, KVFormat.FP8: 0.6}[kv_format]
    blocks = torch.arange(4, device=got.device if kv_format is None else got.codes.device)
    for left, right in zip(read_blocks(got, blocks), read_blocks(expected, blocks), strict=True):
        off = (left.float() - right.float()).abs()
        assert off.max() <= step + TOLERANCE[dtype] * 8
        assert (off > TOLERANCE[dtype] * 4).float().mean() < 0.02


def check_quantised(device, shape, group_tokens, dtype=torch.float32, scale_dtype=torch.float32):
    from prismserve.kernels import fp8, int4, int8
    from prismserve.kernels.fp8 import triton as fp8_triton
    from prismserve.kernels.int4 import triton as int4_triton
    from prismserve.kernels.int8 import triton as int8_triton

    x = (torch.randn(shape, device=device) * 3 + 1).to(dtype)
    kept = {"scale_dtype": scale_dtype}
    rooms = [
        (int8, int8_triton, {"symmetric": True, **kept}),
        (int8, int8_triton, {"symmetric": False, **kept}),
        (int4, int4_triton, kept),
        (fp8, fp8_triton, kept),
    ]
    for room, kernels, options in rooms:
        expected = room.reference.quantise_per_token(x, **options)
        got = kernels.quantise_per_token(x, **options)
        compare_codes(got, expected, device)
        close(kernels.dequantise_per_token(expected), room.reference.dequantise_per_token(expected))
        if room is not fp8:
            expected = room.reference.quantise_per_channel(x, group_tokens, **options)
            compare_codes(kernels.quantise_per_channel(x, group_tokens, **options), expected, device)
            restored = kernels.dequantise_per_channel(expected, group_tokens)
            close(restored, room.reference.dequantise_per_channel(expected, group_tokens))


def compare_codes(got, expected, device):
    """Equal bits; PyTorch divides by a constant through its reciprocal on a GPU, which may move a code by one."""
    assert got.codes.shape == expected.codes.shape
    assert got.codes.dtype == expected.codes.dtype
    differ = (got.codes.view(torch.uint8) != expected.codes.view(torch.uint8)).float()
    assert differ.numel() == 0 or differ.mean() <= (0.01 if device == "cuda" else 0)
    close(got.scale, expected.scale)
    assert (got.offset is None) == (expected.offset is None)
    if got.offset is not None:
        close(got.offset, expected.offset)


def check_elementwise(device, rows, width, dtype=torch.float32):
    from prismserve.kernels import rms_norm, rotary, silu_mul
    from prismserve.kernels.rms_norm import triton as norm_triton
    from prismserve.kernels.rotary import triton as rotary_triton
    from prismserve.kernels.silu_mul import triton as silu_triton

    x, residual = torch.randn(2, rows, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    close(norm_triton.rms_norm(x, weight, 1e-6), rms_norm.reference.rms_norm(x, weight, 1e-6), dtype)
    got, expected = (op.add_rms_norm(x, residual, weight, 1e-6) for op in (norm_triton, rms_norm.reference))
    for left, right in zip(got, expected, strict=True):
        close(left, right, dtype)
    pair = torch.randn(rows, 2 * width, device=device).to(dtype)
    close(silu_triton.silu_mul(pair), silu_mul.reference.silu_mul(pair), dtype)
    heads = torch.randn(rows, 5, width, device=device).to(dtype)[:, 1:4]
    angles = rotary_angles(torch.arange(rows, device=device), torch.rand(width // 2, device=device))
    close(rotary_triton.apply_rotary(heads, *angles), rotary.reference.apply_rotary(heads, *angles), dtype)


def check_block_copy(device, dtype):
    from prismserve.kernels.block_copy import reference, triton

    pool = torch.randint(0, 200, (9, 3, 2, 4, 2, 8), device=device).to(torch.uint8).to(dtype)
    groups = torch.tensor([5, 0, 8], device=device)
    for view in (pool, pool[:, 1], pool[:, :, 0], pool[:, 1, 1]):
        taken = triton.gather_blocks(view, groups)
        assert torch.equal(taken.float(), reference.gather_blocks(view, groups).float())
    into = torch.empty_like(triton.gather_blocks(pool, groups))
    assert triton.gather_blocks(pool, groups, into) is into
    target, expected = pool.clone(), pool.clone()
    triton.scatter_blocks(target[:, 1], groups.flip(0), into[:, 1].contiguous())
    reference.scatter_blocks(expected[:, 1], groups.flip(0), into[:, 1].contiguous())
    assert torch.equal(target.float(), expected.float())
    assert triton.gather_blocks(pool, groups[:0]).shape[0] == 0


def check_top_k(device, heads, tokens, keep):
    from prismserve.kernels.topk_gather import reference, triton

    # Few distinct values, so that ties decide; both zeros and both infinities among them.
    scores = (torch.randn(heads, tokens, device=device) * 2).round() / 2
    scores[0, 0] = -0.0
    scores[-1, -1] = float("inf")
    scores[-1, tokens // 2] = float("-inf")
    indices = triton.top_k(scores, keep)
    assert torch.equal(indices, reference.top_k(scores, keep))
    x = torch.randn(tokens, heads, 24, device=device)
    few = indices[:, :3]
    assert torch.equal(triton.gather_tokens(x, few), reference.gather_tokens(x, few))
