"""The plainest attention backend: one sequence, every score written out."""

from __future__ import annotations

import torch


class DenseBackend:
    """Keeps keys and values of one sequence per layer, and attends causally with explicit scores."""

    def __init__(self, layers: int, scale: float, windows: tuple[int, ...] = ()) -> None:
        self._cache: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers
        self._scale = scale
        self._windows = windows or (0,) * layers

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        held = self._cache[layer]
        keys = k if held is None else torch.cat((held[0], k))
        values = v if held is None else torch.cat((held[1], v))
        self._cache[layer] = (keys, values)
        return dense_attention(q, keys, values, self._scale, self._windows[layer])


def dense_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int = 0
) -> torch.Tensor:
    """[T, H, d] over [S, kv_heads, d]: the queries are the last T of S positions, and see ``window`` back if not 0."""
    tokens, heads, _ = q.shape
    cached = keys.shape[0]
    keys = keys.repeat_interleave(heads // keys.shape[1], dim=1)
    values = values.repeat_interleave(heads // values.shape[1], dim=1)
    scores = torch.einsum("thd,shd->hts", q.float(), keys.float()) * scale
    slots, positions = torch.arange(cached)[None, :], torch.arange(cached - tokens, cached)[:, None]
    seen = (slots <= positions) & (slots > positions - window) if window else slots <= positions
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, values.float()).to(q.dtype)
