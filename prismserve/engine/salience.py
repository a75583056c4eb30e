"""What a cut must know of a layer's attention, without any matrix of scores over all rows.

Scores of a few rows are exact softmax rows over everything the rows may see (recipes R1 and R3). Column sums before the
softmax collapse: ``sum_i q_i . k_j = (sum_i q_i) . k_j`` (R5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prismserve.kernels.rotary import apply_rotary
from prismserve.kernels.score_rows import score_dense_rows

if TYPE_CHECKING:
    from prismserve.models.decoder import Rotary

_TILE_ROWS = 64
_SALIENCE_MIN = 1e-6


@dataclass(frozen=True, slots=True)
class LayerView:
    """Queries and keys of one layer of one sequence.

    Attributes:
        q: [R, H, d] after RoPE, of the rows at hand.
        keys: [B + R, kv_heads, d] after RoPE: those of ``base`` earlier slots, then those of the rows.
        base: B.
        scale: multiplies the scores.
    """

    q: torch.Tensor
    keys: torch.Tensor
    base: int
    scale: float


def row_scores(view: LayerView, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Probabilities [r, H, n] float32 that some rows give some others; all numbers count the rows at hand."""
    places = (rows + view.base).tolist()
    probabilities, _ = score_dense_rows(view.q[rows], view.keys, places, view.scale)
    return probabilities[:, :, columns + view.base]


def rope_scores(rotary: Rotary, base: int, rows: torch.Tensor, columns: torch.Tensor, scale: float) -> torch.Tensor:
    """[r, n] float32: :func:`row_scores` for queries and keys of ones, which differ by position alone.

    Args:
        rotary: angles of ``base`` earlier slots and the rows at hand.
        base: how many slots come before the rows.
        rows: [r] rows that score.
        columns: [n] rows that are scored.
        scale: multiplies the scores.
    """
    angles = rotary[0]
    ones = torch.ones((angles[0].shape[0], 1, angles[0].shape[1]), device=angles[0].device)
    turned = apply_rotary(ones, *angles)
    view = LayerView(turned[base:], turned, base, scale)
    return row_scores(view, rows, columns)[:, 0]


def query_sums(view: LayerView, rows: torch.Tensor) -> torch.Tensor:
    """[H, n] float32: scaled products of each of n rows' keys with the sum of the queries of all n (R5)."""
    total = view.q[rows].float().sum(0)
    keys = view.keys[rows + view.base].float()
    grouped = total.view(keys.shape[1], -1, total.shape[-1])
    return torch.einsum("gqd,ngd->gqn", grouped, keys).reshape(total.shape[0], -1) * view.scale


def blended_rows(view: LayerView, values: torch.Tensor, rows: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Attention of visual rows that also see later visual rows, with weights scaled by the seen one's salience.

    Args:
        view: of the layer; the softmax runs over what a row sees causally and the later rows together.
        values: [B + R, kv_heads, d].
        rows: [n] visual rows, ascending.
        strength: [n] float32, what the exponential of a later row's score is multiplied with; at least 1e-6 is.

    Returns:
        [n, H, d] in the dtype of the queries.
    """
    q, keys = view.q[rows].float(), view.keys.float()
    heads, groups = q.shape[1], keys.shape[1]
    slots = torch.arange(keys.shape[0], device=q.device)
    bias = torch.full((keys.shape[0],), -torch.inf, device=q.device)
    bias[rows + view.base] = strength.clamp_min(_SALIENCE_MIN).log()
    out = torch.empty_like(view.q[rows])
    for first in range(0, len(rows), _TILE_ROWS):
        tile = q[first : first + _TILE_ROWS].view(-1, groups, heads // groups, q.shape[-1])
        scores = torch.einsum("tgqd,sgd->tgqs", tile, keys) * view.scale
        later = slots > (rows[first : first + _TILE_ROWS] + view.base)[:, None]
        scores += torch.where(later, bias, 0.0)[:, None, None, :]
        attended = torch.einsum("tgqs,sgd->tgqd", scores.softmax(-1), values.float())
        out[first : first + _TILE_ROWS] = attended.reshape(-1, heads, q.shape[-1]).to(out.dtype)
    return out
