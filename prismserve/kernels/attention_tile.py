"""The inner step of the attention kernels: a tile of query rows meets a tile of cache slots (arXiv:2307.08691).

Query heads that share a KV head are packed into the rows of a tile, so a KV row is read once for all of them. Codes of
a quantised cache enter the products as they are, and the scale and offset of each slot are applied to the scores (keys)
and to the weights (values): ``q.(c*s + o) = s*(q.c) + o*sum(q)``, ``sum_n p_n*(c_n*s_n + o_n) = (p*s).c + sum(p*o)``.
"""

from __future__ import annotations

import triton.language as tl

from prismserve.kernels.device import INT4, PLAIN, kernel, load_rows


@kernel
def slot_places(
    table: tl.tensor,
    slot: tl.tensor,
    inside: tl.tensor,
    kv_head: tl.tensor,
    strides: tl.tensor,
    scale_strides: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
) -> tl.tensor:
    """Element offsets of the codes and of the scales of cache slots.

    Args:
        table: pointer to the groups of the sequence.
        slot: [N] slots of the sequence.
        inside: [N] bool; others are not looked up.
        kv_head: index.
        strides: of group, slot and head in the codes.
        scale_strides: of group and slot in the scales (heads are contiguous).
        BLOCK_TOKENS: slots per group.

    Returns:
        Two [N] int64.
    """
    group = tl.load(table + slot // BLOCK_TOKENS, mask=inside, other=0).to(tl.int64)
    offset = slot % BLOCK_TOKENS
    rows = group * strides[0] + offset * strides[1] + kv_head * strides[2]
    return rows, group * scale_strides[0] + offset * scale_strides[1] + kv_head


@kernel
def score_tile(
    q: tl.tensor,
    q_sum: tl.tensor,
    keys: tl.tensor,
    key_scale: tl.tensor,
    key_offset: tl.tensor,
    rows: tl.tensor,
    scale_rows: tl.tensor,
    inside: tl.tensor,
    D: tl.constexpr,
    P: tl.constexpr,
    FORMAT: tl.constexpr,
) -> tl.tensor:
    """[M, N] float32 products of q [M, P] with the keys of N slots; ``q_sum`` [M] is q summed over channels."""
    codes = load_rows(keys, rows, inside, D, P, FORMAT, q.dtype)
    scores = tl.dot(q, tl.trans(codes), input_precision="ieee")
    if FORMAT != PLAIN:
        scores *= tl.load(key_scale + scale_rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    if FORMAT == INT4:
        offset = tl.load(key_offset + scale_rows, mask=inside, other=0.0).to(tl.float32)
        scores += q_sum[:, None] * offset[None, :]
    return scores


@kernel
def fold_tile(
    scores: tl.tensor,
    state: tl.tensor,
    values: tl.tensor,
    value_scale: tl.tensor,
    value_offset: tl.tensor,
    rows: tl.tensor,
    scale_rows: tl.tensor,
    inside: tl.tensor,
    D: tl.constexpr,
    P: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """One step of the online softmax.

    Args:
        scores: [M, N] float32 in units of log2, -inf where a row does not see a slot.
        state: greatest score [M], sum of weights [M], weighted values [M, P], weighted offsets [M]; all float32.
        values: pointer, with ``value_scale`` and ``value_offset``.
        value_scale: pointer.
        value_offset: pointer.
        rows: [N] int64 element offsets of the slots.
        scale_rows: [N] int64 offsets of their scales.
        inside: [N] bool.
        D: channels.
        P: D padded to a power of two.
        FORMAT: of the cache.
        DTYPE: what the tensor cores multiply.

    Returns:
        The new state.
    """
    most, total, weighted, shifted = state
    new_most = tl.maximum(most, tl.max(scores, 1))
    # A row that has seen nothing yet keeps -inf, and must not turn into NaN.
    safe = tl.where(new_most == -float("inf"), 0.0, new_most)
    weights = tl.exp2(scores - safe[:, None])
    decay = tl.exp2(most - safe)
    total = total * decay + tl.sum(weights, 1)
    weighted = weighted * decay[:, None]
    if FORMAT == INT4:
        offset = tl.load(value_offset + scale_rows, mask=inside, other=0.0).to(tl.float32)
        shifted = shifted * decay + tl.sum(weights * offset[None, :], 1)
    if FORMAT != PLAIN:
        weights *= tl.load(value_scale + scale_rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    codes = load_rows(values, rows, inside, D, P, FORMAT, DTYPE)
    weighted = tl.dot(weights.to(DTYPE), codes, weighted, input_precision="ieee")
    return new_most, total, weighted, shifted


@kernel
def finish_tile(state: tl.tensor) -> tl.tensor:
    """Attention output [M, P] and natural log-sum-exp [M] of a finished state; 0 and -inf for rows that saw nothing."""
    most, total, weighted, shifted = state
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    out = (weighted + shifted[:, None]) / safe[:, None]
    log_sum = tl.where(seen, (most + tl.log2(safe)) * 0.6931471805599453, -float("inf"))
    return out, log_sum
