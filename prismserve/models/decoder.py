"""One native decoder for the Llama line of text models, driven by its configuration.

Layers are called one by one, so that the caller can prune, stream a finished layer's KV or stop between them. Tokens
of all sequences of a step are flattened into one axis T; who may see whom is the attention backend's business.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from prismserve.kernels.rms_norm import rms_norm
from prismserve.kernels.rotary import apply_rotary, rotary_angles
from prismserve.kernels.silu_mul import silu_mul

if TYPE_CHECKING:
    from prismserve.models.config import DecoderConfig

Rotary: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of a step's positions, each [T, d] float32."""


class AttentionBackend(Protocol):
    """Stores a layer's new keys and values and attends to what the step's sequences have cached."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend in one layer.

        Args:
            layer: decoder layer.
            q: [T, H, d], after RoPE.
            k: [T, kv_heads, d], after RoPE.
            v: [T, kv_heads, d].

        Returns:
            [T, H, d].
        """
        ...


def inverse_frequencies(config: DecoderConfig) -> torch.Tensor:
    """[d/2] float32 rotary frequencies; ``llama3`` scaling is that of Llama 3.1."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        long_waves = wavelengths > scaling.original_context / scaling.low_freq_factor
        short_waves = wavelengths < scaling.original_context / scaling.high_freq_factor
        stretched = torch.where(long_waves, frequencies / scaling.factor, frequencies)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        smooth = (scaling.original_context / wavelengths - scaling.low_freq_factor) / span
        between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
        return torch.where(~short_waves & ~long_waves, between, stretched)
    return frequencies


class DecoderLayer(nn.Module):
    """One transformer block with fused q/k/v and gate/up weights."""

    def __init__(self, config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        queries, cached = config.heads * config.head_dim, config.kv_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        self.input_norm = parameter(hidden)
        self.qkv_weight = parameter(queries + 2 * cached, hidden)
        self.qkv_bias = parameter(queries + 2 * cached) if config.qkv_bias else None
        self.q_norm = parameter(config.head_dim) if config.qk_norm else None
        self.k_norm = parameter(config.head_dim) if config.qk_norm else None
        self.output_weight = parameter(hidden, queries)
        self.output_bias = parameter(hidden) if config.output_bias else None
        self.mlp_norm = parameter(hidden)
        self.gate_up_weight = parameter(2 * inner, hidden)
        self.gate_up_bias = parameter(2 * inner) if config.mlp_bias else None
        self.down_weight = parameter(hidden, inner)
        self.down_bias = parameter(hidden) if config.mlp_bias else None

    def forward(self, index: int, x: torch.Tensor, rotary: Rotary, attention: AttentionBackend) -> torch.Tensor:
        """[T, D] to [T, D]."""
        config = self.config
        tokens, heads = x.shape[0], config.heads
        normed = rms_norm(x, self.input_norm, config.norm_eps)
        qkv = functional.linear(normed, self.qkv_weight, self.qkv_bias).view(tokens, -1, config.head_dim)
        v = qkv[:, heads + config.kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            q = apply_rotary(rms_norm(qkv[:, :heads], self.q_norm, config.norm_eps), *rotary)
            k = apply_rotary(rms_norm(qkv[:, heads : heads + config.kv_heads], self.k_norm, config.norm_eps), *rotary)
        else:
            qk = apply_rotary(qkv[:, : heads + config.kv_heads], *rotary)
            q, k = qk[:, :heads], qk[:, heads:]
        attended = attention.attend(index, q, k, v).reshape(tokens, -1)
        x = x + functional.linear(attended, self.output_weight, self.output_bias)
        normed = rms_norm(x, self.mlp_norm, config.norm_eps)
        gated = silu_mul(functional.linear(normed, self.gate_up_weight, self.gate_up_bias))
        return x + functional.linear(gated, self.down_weight, self.down_bias)

    def weight_targets(self) -> dict[str, torch.Tensor]:
        """Views of the parameters under the names a Hugging Face checkpoint gives their parts."""
        config = self.config
        queries, cached = config.heads * config.head_dim, config.kv_heads * config.head_dim
        rows = {"q_proj": (0, queries), "k_proj": (queries, cached), "v_proj": (queries + cached, cached)}
        halves = {"gate_proj": (0, config.intermediate_size), "up_proj": (config.intermediate_size,) * 2}
        targets: dict[str, torch.Tensor | None] = {
            "input_layernorm.weight": self.input_norm,
            "post_attention_layernorm.weight": self.mlp_norm,
            "self_attn.q_norm.weight": self.q_norm,
            "self_attn.k_norm.weight": self.k_norm,
            "self_attn.o_proj.weight": self.output_weight,
            "self_attn.o_proj.bias": self.output_bias,
            "mlp.down_proj.weight": self.down_weight,
            "mlp.down_proj.bias": self.down_bias,
        }
        fused = (("self_attn", rows, self.qkv_weight, self.qkv_bias),)
        for prefix, parts, weight, bias in (*fused, ("mlp", halves, self.gate_up_weight, self.gate_up_bias)):
            for name, (start, length) in parts.items():
                targets[f"{prefix}.{name}.weight"] = weight.narrow(0, start, length)
                targets[f"{prefix}.{name}.bias"] = None if bias is None else bias.narrow(0, start, length)
        return {name: target for name, target in targets.items() if target is not None}


class Decoder(nn.Module):
    """Embedding, layers and head. Parameters are allocated but not set; see :mod:`prismserve.models.weights`."""

    inverse_frequencies: torch.Tensor

    def __init__(self, config: DecoderConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        device = torch.device(device)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        self.layers = nn.ModuleList(DecoderLayer(config, device, dtype) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size, device=device, dtype=dtype), requires_grad=False)
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        )
        self.register_buffer("inverse_frequencies", inverse_frequencies(config).to(device), persistent=False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] int64 to [T, D]."""
        return functional.embedding(ids, self.embedding)

    def rotary(self, positions: torch.Tensor) -> Rotary:
        """Positions [T] int64 to cos and sin, each [T, head_dim] float32; compute once per step."""
        return rotary_angles(positions, self.inverse_frequencies)

    def layer(self, index: int, x: torch.Tensor, rotary: Rotary, attention: AttentionBackend) -> torch.Tensor:
        """Run one layer: [T, D] to [T, D]."""
        block: DecoderLayer = self.layers[index]  # type: ignore[assignment]
        return block.forward(index, x, rotary, attention)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm and head over the rows given: [T, D] to [T, V] float32."""
        return functional.linear(rms_norm(x, self.norm, self.config.norm_eps), self.head).float()

    def weight_targets(self) -> dict[str, torch.Tensor]:
        """Views of every parameter under its Hugging Face name.

        They are ``embed_tokens.weight``, ``layers.<i>.*``, ``norm.weight`` and, unless tied, ``lm_head.weight``.
        """
        targets: dict[str, torch.Tensor] = {"embed_tokens.weight": self.embedding, "norm.weight": self.norm}
        for index, block in enumerate(self.layers):
            if isinstance(block, DecoderLayer):
                targets |= {f"layers.{index}.{name}": view for name, view in block.weight_targets().items()}
        if not self.config.tie_word_embeddings:
            targets["lm_head.weight"] = self.head
        return targets
