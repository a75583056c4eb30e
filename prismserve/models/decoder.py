"""One native decoder for the Llama line of text models, driven by its configuration.

Layers are called one by one, so that the caller can prune, stream a finished layer's KV or stop between them. Tokens
of all sequences of a step are flattened into one axis T; who may see whom is the attention backend's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from prismserve.kernels.rms_norm import rms_norm
from prismserve.kernels.rotary import apply_rotary
from prismserve.kernels.silu_mul import silu_mul
from prismserve.models.experts import Experts
from prismserve.models.rope import component_of_pair, inverse_frequencies, local_frequencies, position_angles

if TYPE_CHECKING:
    from prismserve.models.config import DecoderConfig

Angles: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of a step's positions, each [T, d] float32."""

Rotary: TypeAlias = tuple[Angles, Angles]
"""Angles of layers that see everything and of layers with a window; the same object unless their bases differ."""


class AttentionBackend(Protocol):
    """Stores a layer's new keys and values and attends to what the step's sequences have cached."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend in one layer, within its window where ``DecoderConfig.windows`` gives it one.

        Args:
            layer: decoder layer.
            q: [T, H, d], after RoPE.
            k: [T, kv_heads, d], after RoPE.
            v: [T, kv_heads, d].

        Returns:
            [T, H, d].
        """
        ...


class DecoderLayer(nn.Module):
    """One transformer block with fused q/k/v and gate/up weights."""

    def __init__(self, config: DecoderConfig, index: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.rotary_kind = 1 if config.windows and config.windows[index] else 0
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
        self.attended_norm = parameter(hidden) if config.sandwich_norms else None
        self.mlp_norm = parameter(hidden)
        self.mlp_out_norm = parameter(hidden) if config.sandwich_norms else None
        if config.experts is not None and config.sparse_layers[index]:
            self.experts: Experts | None = Experts(config, config.experts, device, dtype)
            return
        self.experts = None
        self.gate_up_weight = parameter(2 * inner, hidden)
        self.gate_up_bias = parameter(2 * inner) if config.mlp_bias else None
        self.down_weight = parameter(hidden, inner)
        self.down_bias = parameter(hidden) if config.mlp_bias else None

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return decoder_norm(x, weight, self.config)

    def project(self, x: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, H, d] and keys [T, kv_heads, d] after RoPE, and values [T, kv_heads, d], of what enters [T, D]."""
        config = self.config
        tokens, heads = x.shape[0], config.heads
        angles = rotary[self.rotary_kind]
        qkv = functional.linear(self._norm(x, self.input_norm), self.qkv_weight, self.qkv_bias)
        qkv = qkv.view(tokens, -1, config.head_dim)
        v = qkv[:, heads + config.kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            q = apply_rotary(self._norm(qkv[:, :heads], self.q_norm), *angles)
            k = apply_rotary(self._norm(qkv[:, heads : heads + config.kv_heads], self.k_norm), *angles)
        else:
            qk = apply_rotary(qkv[:, : heads + config.kv_heads], *angles)
            q, k = qk[:, :heads], qk[:, heads:]
        if config.query_scale != 1.0:
            q = q * config.query_scale
        return q, k, v

    def forward(self, index: int, x: torch.Tensor, rotary: Rotary, attention: AttentionBackend) -> torch.Tensor:
        """[T, D] to [T, D]."""
        tokens = x.shape[0]
        q, k, v = self.project(x, rotary)
        attended = attention.attend(index, q, k, v).reshape(tokens, -1)
        attended = functional.linear(attended, self.output_weight, self.output_bias)
        x = x + (attended if self.attended_norm is None else self._norm(attended, self.attended_norm))
        out = self._mlp(self._norm(x, self.mlp_norm))
        return x + (out if self.mlp_out_norm is None else self._norm(out, self.mlp_out_norm))

    def _mlp(self, normed: torch.Tensor) -> torch.Tensor:
        if self.experts is not None:
            mixed: torch.Tensor = self.experts(normed)
            return mixed
        gate_up = functional.linear(normed, self.gate_up_weight, self.gate_up_bias)
        if self.config.activation == "silu":
            gated = silu_mul(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            gated = functional.gelu(gate, approximate="tanh") * up
        return functional.linear(gated, self.down_weight, self.down_bias)

    def weight_targets(self) -> dict[str, torch.Tensor]:
        """Views of the parameters under the names a Hugging Face checkpoint gives their parts."""
        config = self.config
        queries, cached = config.heads * config.head_dim, config.kv_heads * config.head_dim
        rows = {"q_proj": (0, queries), "k_proj": (queries, cached), "v_proj": (queries + cached, cached)}
        # With four norms, the one after attention normalises what it returns; with two, what enters the MLP.
        after_attention = "pre_feedforward_layernorm" if config.sandwich_norms else "post_attention_layernorm"
        targets: dict[str, torch.Tensor | None] = {
            "input_layernorm.weight": self.input_norm,
            f"{after_attention}.weight": self.mlp_norm,
            "self_attn.q_norm.weight": self.q_norm,
            "self_attn.k_norm.weight": self.k_norm,
            "self_attn.o_proj.weight": self.output_weight,
            "self_attn.o_proj.bias": self.output_bias,
        }
        if config.sandwich_norms:
            targets["post_attention_layernorm.weight"] = self.attended_norm
            targets["post_feedforward_layernorm.weight"] = self.mlp_out_norm
        fused = [("self_attn", rows, self.qkv_weight, self.qkv_bias)]
        if self.experts is not None:
            targets |= self.experts.weight_targets()
        else:
            halves = {"gate_proj": (0, config.intermediate_size), "up_proj": (config.intermediate_size,) * 2}
            fused.append(("mlp", halves, self.gate_up_weight, self.gate_up_bias))
            targets["mlp.down_proj.weight"] = self.down_weight
            targets["mlp.down_proj.bias"] = self.down_bias
        for prefix, parts, weight, bias in fused:
            for name, (start, length) in parts.items():
                targets[f"{prefix}.{name}.weight"] = weight.narrow(0, start, length)
                targets[f"{prefix}.{name}.bias"] = None if bias is None else bias.narrow(0, start, length)
        return {name: target for name, target in targets.items() if target is not None}


def decoder_norm(x: torch.Tensor, weight: torch.Tensor, config: DecoderConfig) -> torch.Tensor:
    """RMSNorm over the last axis; weights stored as their difference from 1 are added up in float32."""
    if not config.unit_norms:
        return rms_norm(x, weight, config.norm_eps)
    return rms_norm(x.float(), weight.float() + 1.0, config.norm_eps).to(x.dtype)


class Decoder(nn.Module):
    """Embedding, layers and head. Parameters are allocated but not set; see :mod:`prismserve.models.weights`."""

    inverse_frequencies: torch.Tensor
    local_frequencies: torch.Tensor | None
    position_components: torch.Tensor | None

    def __init__(self, config: DecoderConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        device = torch.device(device)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        self.layers = nn.ModuleList(DecoderLayer(config, index, device, dtype) for index in range(config.layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size, device=device, dtype=dtype), requires_grad=False)
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        )
        self.register_buffer("inverse_frequencies", inverse_frequencies(config).to(device), persistent=False)
        local, components = local_frequencies(config), component_of_pair(config)
        self.register_buffer("local_frequencies", None if local is None else local.to(device), persistent=False)
        components = None if components is None else components.to(device)
        self.register_buffer("position_components", components, persistent=False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] int64 to [T, D]."""
        embedded = functional.embedding(ids, self.embedding)
        if self.config.embedding_scale == 1.0:
            return embedded
        # Rounded to the dtype first, as these models were trained.
        return embedded * torch.tensor(self.config.embedding_scale, dtype=embedded.dtype, device=embedded.device)

    def rotary(self, positions: torch.Tensor) -> Rotary:
        """Angles of a step's positions; compute once per step.

        Args:
            positions: [T] int64; or [3, T], time, row and column, for a decoder with ``mrope_section``.
        """
        angles = position_angles(positions, self.inverse_frequencies, self.position_components)
        if self.local_frequencies is None:
            return angles, angles
        return angles, position_angles(positions, self.local_frequencies, self.position_components)

    def layer(self, index: int, x: torch.Tensor, rotary: Rotary, attention: AttentionBackend) -> torch.Tensor:
        """Run one layer: [T, D] to [T, D]."""
        block: DecoderLayer = self.layers[index]  # type: ignore[assignment]
        return block.forward(index, x, rotary, attention)

    def project(self, index: int, x: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values that a layer would compute of its input [T, D], without running it."""
        block: DecoderLayer = self.layers[index]  # type: ignore[assignment]
        return block.project(x, rotary)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm and head over the rows given: [T, D] to [T, V] float32."""
        logits = functional.linear(decoder_norm(x, self.norm, self.config), self.head).float()
        cap = self.config.logit_softcap
        return (logits / cap).tanh() * cap if cap else logits

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
