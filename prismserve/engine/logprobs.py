"""Log-probabilities of chosen tokens, for the rows of a batch whose requests ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prismserve.core.types import TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.engine.sampler import SampleRow

# What JSON can hold in place of the logarithm of zero; OpenAI's own stand-in.
LOGPROB_MIN = -9999.0


class RawScores:
    """The model's own scores of some rows, kept from before bias, penalties, constraints and temperature.

    Args:
        logits: [B, V] float32, not yet changed; a copy of the rows is kept.
        rows: B rows.
    """

    def __init__(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        self._members = [(i, k) for i, row in enumerate(rows) if (k := row.params.logprobs) is not None]
        index = torch.tensor([i for i, _ in self._members], dtype=torch.int64, device=logits.device)
        self._scores = torch.log_softmax(logits[index], dim=-1).clamp_(min=LOGPROB_MIN) if self._members else None

    def of(self, tokens: Sequence[int]) -> dict[int, TokenLogprobs]:
        """Log-probabilities of the chosen tokens of all B rows, by row; a row with a negative token has none."""
        scores = self._scores
        if scores is None:
            return {}
        chosen = torch.tensor([max(tokens[i], 0) for i, _ in self._members], dtype=torch.int64, device=scores.device)
        values: list[float] = scores.gather(1, chosen[:, None])[:, 0].tolist()
        most = min(max(k for _, k in self._members), scores.shape[1])
        best, order = scores.topk(most, dim=-1) if most else (scores[:, :0], scores[:, :0].long())
        tops = [tuple(zip(ids, logs, strict=True)) for ids, logs in zip(order.tolist(), best.tolist(), strict=True)]
        return {
            i: TokenLogprobs(value, top[:k])
            for (i, k), value, top in zip(self._members, values, tops, strict=True)
            if tokens[i] >= 0
        }
