"""A small random text model, requests of bare token ids, and what a dense cache says they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from prismserve.core.types import (
    CompressionPlan,
    FinishReason,
    Prompt,
    Request,
    SamplingParams,
    TextSegment,
    TokenOutput,
)
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.models.base import ModelIdentity, ModelShape
from prismserve.models.causal import CausalModel
from prismserve.models.config import DecoderConfig
from prismserve.models.processing import Processor
from prismserve.models.reference import reference_path
from tests.engine.rounding import ROUNDED, row_bytes
from tests.models.dense_backend import dense_attention

NAMESPACE = b"n" * 32
LAYERS, KV_HEADS, HEADS, HEAD_DIM, VOCAB = 3, 2, 4, 8, 96
BLOCK = 4

Keep = dict[int, torch.Tensor]
"""What is kept of each compacted layer, once the prompt is computed."""


class DenseCache:
    """Attention over one sequence with every score written out, whose layers can be compacted.

    Keys and values are rounded as ``kv_format`` would when they come in, and never again.
    """

    def __init__(self, kv_format: str = "auto") -> None:
        self.rounded = ROUNDED[kv_format]
        self.held: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * LAYERS

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        held = self.held[layer]
        k, v = self.rounded(k), self.rounded(v)
        keys, values = (k, v) if held is None else (torch.cat((held[0], k)), torch.cat((held[1], v)))
        self.held[layer] = keys, values
        return dense_attention(q, keys, values, HEAD_DIM**-0.5)

    def compact(self, layer: int, keep: torch.Tensor) -> None:
        keys, values = self.held[layer]
        rows = keep[None].expand(KV_HEADS, -1) if keep.dim() == 1 else keep
        self.held[layer] = tuple(
            torch.stack([part[rows[head], head] for head in range(KV_HEADS)], dim=1) for part in (keys, values)
        )


class TextWorkshop:
    """Builds the model once; engines, requests and expectations around it."""

    def __init__(self, device: torch.device | str = "cpu", windows: tuple[int, ...] = ()) -> None:
        config = DecoderConfig(48, LAYERS, HEADS, KV_HEADS, HEAD_DIM, 64, VOCAB, 1e-6, 512, 10000.0, windows=windows)
        shape = ModelShape(config)
        identity = ModelIdentity(b"f" * 32, b"e" * 32, frozenset({1}))
        self.model = CausalModel(shape, identity, torch.device(device), torch.float32)
        self.processor = Processor.from_directory(reference_path())
        generator = torch.Generator().manual_seed(5)
        for name, target in self.model.weight_targets().items():
            scale = 1.0 if "embed" in name else 0.25
            drawn = torch.randn(target.shape, generator=generator) * scale
            target.copy_(1 + 0.1 * drawn if "norm" in name else drawn)
        self._known: dict[Any, list[int]] = {}

    def prompt(self, seed: int, tokens: int, shared: int = 0) -> tuple[int, ...]:
        """Token ids, the first ``shared`` of which are the same for every seed."""
        common = torch.randint(2, VOCAB, (shared,), generator=torch.Generator().manual_seed(99)).tolist()
        own = torch.randint(2, VOCAB, (tokens - shared,), generator=torch.Generator().manual_seed(seed)).tolist()
        return (*common, *own)

    def request(self, name: str, ids: Sequence[int], max_tokens: int = 12, **changes: Any) -> Request:
        return Request(
            request_id=name,
            attempt=0,
            namespace=NAMESPACE,
            wire_namespace=NAMESPACE,
            prompt=Prompt((TextSegment(tuple(ids)),)),
            media=(),
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            compression=CompressionPlan(),
            **changes,
        )

    def engine(self, blocks: int = 200, clock: Callable[[], float] | None = None, **config: Any) -> Engine:
        token_bytes = LAYERS * 2 * KV_HEADS * row_bytes(config.get("kv_cache_dtype", "auto"), HEAD_DIM)
        config = {"block_tokens": BLOCK, "max_model_len": min(512, blocks * BLOCK), **config}
        config["kv_cache_bytes"] = blocks * config["block_tokens"] * token_bytes
        extra = {} if clock is None else {"clock": clock}
        return Engine(self.model, self.processor, EngineConfig(**config), **extra)

    @torch.inference_mode()
    def expected(self, ids: Sequence[int], tokens: int, keep: Keep | None = None, kv_format: str = "auto") -> list[int]:
        """Greedy tokens with a dense cache; ``keep`` is applied once the prompt is computed."""
        told = {layer: rows.tolist() for layer, rows in (keep or {}).items()}
        name = (tuple(ids), tokens, repr(told), kv_format)
        if name not in self._known:
            decoder, cache, out = self.model.decoder, DenseCache(kv_format), []
            chunk, position = torch.tensor(ids), 0
            for step in range(tokens):
                rotary = decoder.rotary(torch.arange(position, position + len(chunk)))
                x = decoder.embed(chunk)
                for layer in range(LAYERS):
                    x = decoder.layer(layer, x, rotary, cache)
                out.append(int(decoder.logits(x[-1:]).argmax()))
                position += len(chunk)
                chunk = torch.tensor(out[-1:])
                for layer, rows in (keep or {}).items() if step == 0 else ():
                    cache.compact(layer, rows)
            self._known[name] = out
        return self._known[name]


class Driver:
    """Steps an engine, compacts requests as soon as their first token is out, and collects what comes."""

    def __init__(self, engine: Engine, keeps: dict[str, Keep] | None = None) -> None:
        self.engine = engine
        self.keeps = dict(keeps or {})
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, TokenOutput] = {}

    def step(self) -> None:
        for output in self.engine.step():
            name = output.request_id
            self.tokens.setdefault(name, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.ends[name] = output
            elif name in self.keeps:
                for layer, keep in self.keeps.pop(name).items():
                    self.engine.compact(name, 0, layer, keep)
                    self.engine.check_integrity()
        self.engine.check_integrity()

    def run(self, steps: int = 3000) -> dict[str, list[int]]:
        for _ in range(steps):
            if not self.engine.has_work:
                return self.tokens
            self.step()
        message = f"still working after {steps} steps"
        raise AssertionError(message)

    def all_finished(self) -> bool:
        return all(end.finish_reason is FinishReason.LENGTH for end in self.ends.values())
