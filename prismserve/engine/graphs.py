"""Decode steps over static buffers, so that a GPU can replay them as CUDA graphs instead of launching kernel by kernel.

A step in which every sequence computes one generated token over a uniform table always runs the same kernels. Its
inputs are written into buffers that never move, padded to the next of a few batch sizes; the kernels launched over them
are recorded once per size and replayed from then on. All but recording and replaying runs on any device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from prismserve.kernels.dispatch import use_triton_on
from prismserve.kernels.paged_cache import write_kv
from prismserve.kernels.paged_decode import paged_decode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prismserve.engine.config import EngineConfig
    from prismserve.engine.pool import KVPool
    from prismserve.engine.run_item import RunItem
    from prismserve.models.base import VisionLanguageModel
    from prismserve.models.config import DecoderConfig

_WARM_UP_RUNS = 2


def batch_sizes(batch_max: int) -> tuple[int, ...]:
    """Batch sizes that are recorded: powers of two below 16, then multiples of 16, up to one that holds ``batch_max``."""
    candidates = (1, 2, 4, 8, *range(16, batch_max + 16, 16))
    largest = next(size for size in candidates if size >= batch_max)
    return tuple(size for size in candidates if size <= largest)


def size_for(batch: int, sizes: Sequence[int]) -> int | None:
    """The smallest of ``sizes`` (ascending) that holds ``batch``; None if none does."""
    return next((size for size in sizes if batch <= size), None)


def recordable(config: DecoderConfig) -> bool:
    """Whether a decoder's decode step runs the same kernels every time: no windows, no experts, no masks of images."""
    return not config.windows and not config.bidirectional_images and config.experts is None


class DecodeBuffers:
    """Inputs of a decode step at fixed addresses, for up to ``rows`` sequences.

    Rows that no sequence uses write into the scratch block and see that one slot of it.

    Attributes:
        ids: [rows] int64.
        positions: [rows] int64.
        slots: [rows] int64, ``group * block_tokens + offset``.
        tables: [rows, blocks] int32 groups.
        kv_lens: [rows] int32, the new token included.
    """

    def __init__(self, rows: int, blocks: int, pool: KVPool) -> None:
        """Allocate for tables of up to ``blocks`` groups over a pool that has a scratch group."""
        device = pool.device
        self._block_tokens = pool.block_tokens
        self._scratch = pool.scratch_group
        self.ids, self.positions, self.slots = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3))
        self.kv_lens = torch.ones(rows, dtype=torch.int32, device=device)
        self.tables = torch.full((rows, blocks), self._scratch, dtype=torch.int32, device=device)

    def fill(self, items: Sequence[RunItem], size: int) -> None:
        """Write a step's inputs into the first ``size`` rows.

        Args:
            items: at most ``size`` decodes of uniform sequences.
            size: rows that the step will compute.
        """
        block, idle = self._block_tokens, size - len(items)
        sequences = [item.sequence for item in items]
        starts = [item.start for item in items]
        ids = [sequence.slots[start] for sequence, start in zip(sequences, starts, strict=True)]
        positions = [s.first_position + start - s.prompt_tokens for s, start in zip(sequences, starts, strict=True)]
        slots = [s.table[start // block] * block + start % block for s, start in zip(sequences, starts, strict=True)]
        wide = torch.tensor([ids, positions, slots], dtype=torch.int64)
        for row, target in zip(wide, (self.ids, self.positions, self.slots), strict=True):
            target[: len(items)].copy_(row)
        self.kv_lens[: len(items)].copy_(torch.tensor([start + 1 for start in starts], dtype=torch.int32))
        used = [sequence.table[: start // block + 1] for sequence, start in zip(sequences, starts, strict=True)]
        width = max(len(table) for table in used)
        padded = [[*table, *[self._scratch] * (width - len(table))] for table in used]
        self.tables[: len(items), :width].copy_(torch.tensor(padded, dtype=torch.int32))
        if idle:
            rest = slice(len(items), size)
            self.ids[rest] = 0
            self.positions[rest] = 0
            self.slots[rest] = self._scratch * block
            self.kv_lens[rest] = 1
            self.tables[rest, 0] = self._scratch


class _StaticAttention:
    """Attention of a decode step over the first ``size`` rows of the buffers."""

    def __init__(self, pool: KVPool, buffers: DecodeBuffers, size: int) -> None:
        self._pool = pool
        self._slots, self._tables, self._kv_lens = buffers.slots[:size], buffers.tables[:size], buffers.kv_lens[:size]
        self._scale = pool.layout.head_dim**-0.5

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        dtype, view = self._pool.memory.dtype, self._pool.layer(layer)
        write_kv(view, self._slots, k.to(dtype), v.to(dtype))
        return paged_decode(q.to(dtype), view, self._tables, self._kv_lens, self._scale)[0].to(q.dtype)


class Replay(Protocol):
    """Runs the step of one batch size: the first time by calling it, later by any means with the same effect."""

    def __call__(self, size: int, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The step's result; the memory may be that of the result before."""
        ...


class CudaReplay:
    """Records a CUDA graph per batch size when the size is first seen, and replays it from then on."""

    def __init__(self, device: torch.device) -> None:
        """Record on ``device``; all graphs share one memory pool."""
        self._device = device
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, size: int, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See :class:`Replay`."""
        known = self._graphs.get(size)
        if known is None:
            known = self._graphs[size] = self._record(step)
        graph, result = known
        graph.replay()
        return result

    def _record(self, step: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # Kernels are compiled and libraries set up outside the recording; the step may be repeated without harm.
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call] # torch leaves its signature out
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_RUNS):
                step()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            result = step()
        return graph, result


class DecodeGraphs:
    """Decode steps of uniform sequences by static buffers."""

    def __init__(
        self, model: VisionLanguageModel, pool: KVPool, batch_max: int, blocks_max: int, replay: Replay
    ) -> None:
        """Serve steps of up to ``batch_max`` sequences with tables of up to ``blocks_max`` groups."""
        self._model = model
        self._pool = pool
        self._sizes = batch_sizes(batch_max)
        self._blocks_max = blocks_max
        self._buffers = DecodeBuffers(self._sizes[-1], blocks_max, pool)
        self._replay = replay

    def accepts(self, items: Sequence[RunItem]) -> bool:
        """Whether a step is one that :meth:`run` can do: every item one generated token of a uniform sequence."""
        return len(items) <= self._sizes[-1] and all(self._plain(item) for item in items)

    def run(self, items: Sequence[RunItem]) -> torch.Tensor:
        """Compute the step: [n, vocabulary] float32, a row for each item."""
        size = size_for(len(items), self._sizes)
        assert size is not None  # noqa: S101 - accepts() was asked
        self._buffers.fill(items, size)
        return self._replay(size, lambda: self._step(size))[: len(items)].clone()

    def _plain(self, item: RunItem) -> bool:
        sequence = item.sequence
        return (
            item.tokens == 1
            and item.samples
            and item.start >= sequence.prompt_tokens
            and isinstance(sequence.slots[item.start], int)
            and sequence.ragged is None
            and sequence.focusing is None
            and (sequence.taps is None or sequence.taps.finished)
            and item.start // self._pool.block_tokens < self._blocks_max
        )

    def _step(self, size: int) -> torch.Tensor:
        decoder = self._model.decoder
        attention = _StaticAttention(self._pool, self._buffers, size)
        x = decoder.embed(self._buffers.ids[:size])
        rotary = decoder.rotary(self._buffers.positions[:size])
        for layer in range(decoder.config.layers):
            x = decoder.layer(layer, x, rotary, attention)
        return decoder.logits(x)


def replay_for(config: EngineConfig, decoder: DecoderConfig, device: torch.device) -> Replay | None:
    """How decode steps are replayed on a device; None where they are launched kernel by kernel."""
    if not config.cuda_graphs or device.type != "cuda" or not use_triton_on(device) or not recordable(decoder):
        return None
    return CudaReplay(device)
