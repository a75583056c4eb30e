"""Causal attention over a paged KV cache, and writing into it.

One layer of the cache is a view ``[groups, 2, block_tokens, kv_heads, head_dim]`` (0 keys, 1 values); only the last
axis has to be contiguous. A slot is ``group * block_tokens + offset``.
"""

from prismserve.kernels.paged_attention.plan import PagedBatch, plan_batch
from prismserve.kernels.paged_attention.reference import attend, paged_attention, write_kv

__all__ = ["PagedBatch", "attend", "paged_attention", "plan_batch", "write_kv"]
