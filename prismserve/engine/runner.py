"""One forward pass over a flattened batch of prefill chunks and decodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prismserve.core.errors import EngineError
from prismserve.engine.attention import PagedAttention
from prismserve.engine.cutting import CuttingAttention, enter_layer, join_positions
from prismserve.engine.focused import FocusedAttention, focuses
from prismserve.engine.masking import MaskedAttention
from prismserve.engine.tapped import TappedAttention, tapped
from prismserve.kernels.dispatch import use_triton_on

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prismserve.engine.cutting import Stage
    from prismserve.engine.graphs import DecodeGraphs
    from prismserve.engine.pool import KVPool
    from prismserve.engine.run_item import RunItem
    from prismserve.models.base import VisionLanguageModel
    from prismserve.models.decoder import AttentionBackend


class ModelRunner:
    """Builds inputs, runs the decoder layer by layer, returns the logits that are needed."""

    def __init__(self, model: VisionLanguageModel, pool: KVPool, graphs: DecodeGraphs | None = None) -> None:
        """Run ``model`` over the blocks of ``pool``; steps that ``graphs`` accepts go through it."""
        self._graphs = graphs
        self._model = model
        self._pool = pool
        self._stack = model.decoder.stack()
        self._offsets = torch.arange(pool.block_tokens)

    def run(self, items: Sequence[RunItem], layer_done: Callable[[int], None] | None) -> torch.Tensor:
        """Compute the items and write their KV. Nothing may change a table of theirs meanwhile.

        Args:
            items: at least one; different sequences, ragged ones after the others, those with a stage last.
            layer_done: called with the layer's index once the KV of all items is final in that layer.

        Returns:
            [n, vocabulary] float32, a row for each item that samples, in order.
        """
        if self._graphs is not None and layer_done is None and self._graphs.accepts(items):
            return self._graphs.run(items)
        decoder = self._model.decoder
        ids, positions, slots = self._inputs(items)
        x = decoder.embed(ids)
        deepstack = self._place_images(x, items)
        stages = [item.stage for item in items if item.stage is not None]
        attention = self._attention(items, slots, stages)
        rotary = decoder.rotary(positions)
        taps = attention if isinstance(attention, TappedAttention) else None
        last, rows, first = decoder.config.layers - 1, None, 0
        whole = layer_done is None and deepstack is None
        if self._stack is not None and whole and isinstance(attention, PagedAttention) and attention.stacks():
            rows = _sampled_rows(items, last, x)
            first = last if rows is not None else last + 1
            x = attention.run_stack(self._stack, x, rotary[0], first)
        for layer in range(first, last + 1):
            if stages:
                x, positions, angles = enter_layer(layer, x, positions, stages, decoder, self._pool)
                rotary = rotary if angles is None else angles
                if x.shape[0] == 0:
                    break
            if taps is not None:
                taps.enter(layer, x)
            deep = deepstack if layer < decoder.config.deepstack_layers else None
            if layer == last and deep is None and rows is None:
                rows = _sampled_rows(items, last, x)
            x = decoder.layer(layer, x, rotary, attention, rows)
            if deep is not None:
                x = x.index_add(0, deep[0], deep[1][layer])
            if layer_done is not None:
                layer_done(layer)
        if rows is None and first == 0:
            rows = _sampled_rows(items, last, x)
            x = x if rows is None else x[rows]
        return decoder.logits(x)

    def _paged(self, items: Sequence[RunItem], slots: torch.Tensor) -> PagedAttention:
        uniform = [item for item in items if item.sequence.ragged is None]
        if any(item.sequence.ragged is not None for item in items[: len(uniform)]):
            message = "ragged sequences must come last in a batch"
            raise EngineError(message)
        layers = self._model.decoder.config.layers
        return PagedAttention(
            self._pool,
            [item.sequence.table for item in uniform],
            [item.start for item in uniform],
            [item.tokens for item in uniform],
            slots,
            [
                (item.sequence.ragged or (), [item.tokens] * layers if item.stage is None else item.stage.counts)
                for item in items[len(uniform) :]
            ],
        )

    def _attention(self, items: Sequence[RunItem], slots: torch.Tensor, stages: Sequence[Stage]) -> AttentionBackend:
        paged = self._paged(items, slots)
        config = self._model.decoder.config
        masked = bool(config.windows) or config.bidirectional_images
        attention: AttentionBackend = MaskedAttention(paged, config, self._pool, items, slots) if masked else paged
        focused = any(focuses(item) for item in items)
        if focused:
            attention = FocusedAttention(paged, self._pool, items, slots, self._paged)
        if stages:
            attention = CuttingAttention(attention, stages, self._model.decoder, self._pool)
        if not tapped(items):
            return attention
        # The kernels return log-sum-exps at no cost; the fused attention of a CPU does not, and must not be replaced.
        plain = not (masked or stages or focused)
        with_lse = paged.attend_with_lse if plain and use_triton_on(self._pool.device) else None
        return TappedAttention(attention, self._pool, items, config, with_lse)

    def _inputs(self, items: Sequence[RunItem]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, positions and cache slots on the model's device: [T] int64 each; positions may be [3, T]."""
        block = self._pool.block_tokens
        pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        decodes: list[tuple[int, int, int]] = []

        def flush() -> None:
            if decodes:
                ids, positions, slots = torch.tensor(decodes, dtype=torch.int64).unbind(1)
                pieces.append((ids, positions, slots))
                decodes.clear()

        for item in items:
            sequence, start = item.sequence, item.start
            element = sequence.slots[start]
            if item.tokens == 1 and start >= sequence.prompt_tokens and isinstance(element, int):
                position = sequence.first_position + start - sequence.prompt_tokens
                slot = 0 if sequence.ragged is not None else sequence.table[start // block] * block + start % block
                decodes.append((element, position, slot))
                continue
            flush()
            pieces.append(self._prefill_inputs(item))
        flush()
        if len(pieces) == 1:
            ids, positions, slots = pieces[0]
        else:
            parts = list(zip(*pieces, strict=True))
            ids, positions, slots = torch.cat(parts[0]), join_positions(parts[1]), torch.cat(parts[2])
        device = self._pool.device
        return ids.to(device), positions.to(device), slots.to(device)

    def _prefill_inputs(self, item: RunItem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sequence, start, end = item.sequence, item.start, item.start + item.tokens
        if sequence.ids is None or sequence.positions is None:
            sequence.prepare_inputs()
        assert sequence.ids is not None  # noqa: S101 - prepare_inputs sets both
        assert sequence.positions is not None  # noqa: S101
        if sequence.ragged is not None:
            return sequence.ids[start:end], sequence.positions[start:end], torch.zeros(item.tokens, dtype=torch.int64)
        block = self._pool.block_tokens
        first = start // block
        table = torch.tensor(sequence.table[first : -(-end // block)], dtype=torch.int64)
        slots = (table[:, None] * block + self._offsets).flatten()[start - first * block :][: item.tokens]
        return sequence.ids[start:end], sequence.positions[..., start:end], slots

    def _place_images(
        self, x: torch.Tensor, items: Sequence[RunItem]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """Put image embeddings into their rows of ``x`` [T, D].

        Returns:
            For a decoder with ``deepstack_layers``, the rows [n] and per such layer what to add to them [n, D]; None
            if there is nothing to add.
        """
        offset, width = 0, x.shape[1]
        places: list[torch.Tensor] = []
        visual: list[torch.Tensor] = []
        for item in items:
            if item.sequence.images and item.start < item.sequence.prompt_tokens:
                rows, pieces = item.sequence.embeds(item.start, item.start + item.tokens)
                if rows is not None:
                    places.append(rows + offset)
                    visual.extend(pieces)
            offset += item.tokens
        if not places:
            return None
        rows, wide = torch.cat(places).to(x.device), torch.cat(visual).to(x)
        x[rows] = wide[:, :width]
        layers = wide.shape[1] // width
        return (rows, wide.view(-1, layers, width).unbind(1)[1:]) if layers > 1 else None


def _sampled_rows(items: Sequence[RunItem], last: int, x: torch.Tensor) -> torch.Tensor | None:
    """Rows of the last layer's ``x`` [T, D] whose logits are wanted, [R] int64; None for all of them."""
    rows: list[int] = []
    end = 0
    for item in items:
        end += item.rows(last)
        if item.samples:
            rows.append(end - 1)
    return torch.tensor(rows, dtype=torch.int64, device=x.device) if len(rows) < x.shape[0] else None
