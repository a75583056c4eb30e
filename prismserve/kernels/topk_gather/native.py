"""Selection of the best-scored tokens as a native kernel."""

from __future__ import annotations

import torch

from prismserve.kernels.native.library import call
from prismserve.kernels.topk_gather.reference import check_selection


def top_k(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """As the reference."""
    check_selection(scores, keep)
    rows, count = scores.shape
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    indices = torch.empty((rows, keep), dtype=torch.int64)
    call("top_k", scores.data_ptr(), scores.stride(0), rows, count, keep, indices.data_ptr())
    return indices
