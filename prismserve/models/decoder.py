"""One native decoder for the Llama line of text models, driven by its configuration.

Layers are called one by one, so that the caller can prune, stream a finished layer's KV or stop between them. Tokens
of all sequences of a step are flattened into one axis T; who may see whom is the attention backend's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from prismserve.kernels.dispatch import use_native_on
from prismserve.kernels.layer_stack import LayerStack, LayerWeights
from prismserve.kernels.linear import Norm
from prismserve.kernels.rms_norm import rms_norm
from prismserve.kernels.rotary import rotate_heads
from prismserve.models.experts import Experts
from prismserve.models.linear import Linear
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

        def linear(inputs: int, outputs: int, *, bias: bool) -> Linear:
            return Linear.empty(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.input_norm = parameter(hidden)
        self.qkv = linear(hidden, queries + 2 * cached, bias=config.qkv_bias)
        self.q_norm = parameter(config.head_dim) if config.qk_norm else None
        self.k_norm = parameter(config.head_dim) if config.qk_norm else None
        self.output = linear(queries, hidden, bias=config.output_bias)
        self.attended_norm = parameter(hidden) if config.sandwich_norms else None
        self.mlp_norm = parameter(hidden)
        self.mlp_out_norm = parameter(hidden) if config.sandwich_norms else None
        if config.experts is not None and config.sparse_layers[index]:
            self.experts: Experts | None = Experts(config, config.experts, device, dtype)
            return
        self.experts = None
        self.gate_up = linear(hidden, 2 * inner, bias=config.mlp_bias)
        self.down = linear(inner, hidden, bias=config.mlp_bias)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return decoder_norm(x, weight, self.config)

    def _entering(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, Norm | None]:
        """What a product takes for the norm of ``x``: itself and the norm, where that can be fused."""
        if self.config.unit_norms:
            return self._norm(x, weight), None
        return x, Norm(weight, self.config.norm_eps)

    def project(self, x: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, H, d] and keys [T, kv_heads, d] after RoPE, and values [T, kv_heads, d], of what enters [T, D]."""
        config = self.config
        rotated = config.heads + config.kv_heads
        qkv = self.qkv.forward(*self._entering(x, self.input_norm)).view(x.shape[0], -1, config.head_dim)
        q, k = self._rotated(qkv[:, :rotated], rotary[self.rotary_kind])
        return q, k, qkv[:, rotated:]

    def forward(
        self,
        index: int,
        x: torch.Tensor,
        rotary: Rotary,
        attention: AttentionBackend,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, D] to [T, D], or to [R, D] of the ``rows`` asked for."""
        tokens = x.shape[0]
        q, k, v = self.project(x, rotary)
        attended = attention.attend(index, q, k, v).reshape(tokens, -1)
        if rows is not None:
            attended, x = attended[rows], x[rows]
            if rows.shape[0] == 0:
                return x
        if self.attended_norm is None:
            x = self.output.forward(attended, residual=x)
        else:
            x = x + self._norm(self.output.forward(attended), self.attended_norm)
        if self.mlp_out_norm is None:
            return self._mlp(x, residual=x)
        return x + self._norm(self._mlp(x, residual=None), self.mlp_out_norm)

    def _rotated(self, qk: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [T, H, d] and keys [T, kv_heads, d] after their norms and RoPE, queries scaled."""
        config, heads = self.config, self.config.heads
        gains = None
        if self.q_norm is not None and self.k_norm is not None:
            if config.unit_norms:
                qk = torch.cat((self._norm(qk[:, :heads], self.q_norm), self._norm(qk[:, heads:], self.k_norm)), dim=1)
            else:
                gains = (self.q_norm, self.k_norm, heads, config.norm_eps)
        qk = rotate_heads(qk, angles, gains)
        q, k = qk[:, :heads], qk[:, heads:]
        return (q if config.query_scale == 1.0 else q * config.query_scale), k

    def _mlp(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """The MLP of the norm of ``x``, plus the residual if there is one."""
        if self.experts is not None:
            mixed: torch.Tensor = self.experts(self._norm(x, self.mlp_norm))
            return mixed if residual is None else residual + mixed
        entering = self._entering(x, self.mlp_norm)
        if self.config.activation == "silu":
            gated = self.gate_up.forward(*entering, gated=True)
        else:
            gate, up = self.gate_up.forward(*entering).chunk(2, dim=-1)
            gated = functional.gelu(gate, approximate="tanh") * up
        out: torch.Tensor = self.down.forward(gated, residual=residual)
        return out

    def stackable(self) -> LayerWeights | None:
        """The layer's parts for a :class:`LayerStack`; None if a stack cannot compute what this layer does."""
        config = self.config
        plain = self.experts is None and self.attended_norm is None and self.mlp_out_norm is None
        if not plain or config.unit_norms or config.activation != "silu" or config.query_scale != 1.0:
            return None
        if not all(linear.packed for linear in (self.qkv, self.output, self.gate_up, self.down)):
            return None
        weights = LayerWeights(
            input_norm=self.input_norm,
            qkv=self.qkv.weight,
            qkv_bias=self.qkv.bias,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            output=self.output.weight,
            output_bias=self.output.bias,
            mlp_norm=self.mlp_norm,
            gate_up=self.gate_up.weight,
            gate_up_bias=self.gate_up.bias,
            down=self.down.weight,
            down_bias=self.down.bias,
        )
        return weights if weights.suits() else None

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
            "self_attn.o_proj.weight": self.output.weight,
            "self_attn.o_proj.bias": self.output.bias,
        }
        if config.sandwich_norms:
            targets["post_attention_layernorm.weight"] = self.attended_norm
            targets["post_feedforward_layernorm.weight"] = self.mlp_out_norm
        fused = [("self_attn", rows, self.qkv)]
        if self.experts is not None:
            targets |= self.experts.weight_targets()
        else:
            halves = {"gate_proj": (0, config.intermediate_size), "up_proj": (config.intermediate_size,) * 2}
            fused.append(("mlp", halves, self.gate_up))
            targets["mlp.down_proj.weight"] = self.down.weight
            targets["mlp.down_proj.bias"] = self.down.bias
        for prefix, parts, linear in fused:
            for name, (start, length) in parts.items():
                targets[f"{prefix}.{name}.weight"] = linear.weight.narrow(0, start, length)
                targets[f"{prefix}.{name}.bias"] = None if linear.bias is None else linear.bias.narrow(0, start, length)
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
        self.dtype = dtype

        def table() -> Linear:
            return Linear.empty(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)

        self.embedding = table()
        self.layers = nn.ModuleList(DecoderLayer(config, index, device, dtype) for index in range(config.layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size, device=device, dtype=dtype), requires_grad=False)
        self.head = self.embedding if config.tie_word_embeddings else table()
        self.register_buffer("inverse_frequencies", inverse_frequencies(config).to(device), persistent=False)
        local, components = local_frequencies(config), component_of_pair(config)
        self.register_buffer("local_frequencies", None if local is None else local.to(device), persistent=False)
        components = None if components is None else components.to(device)
        self.register_buffer("position_components", components, persistent=False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] int64 to [T, D]."""
        embedded: torch.Tensor = self.embedding.rows(ids, self.dtype)
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

    def layer(
        self,
        index: int,
        x: torch.Tensor,
        rotary: Rotary,
        attention: AttentionBackend,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run one layer: [T, D] to [T, D].

        Args:
            index: of the layer.
            x: [T, D].
            rotary: of :meth:`rotary`.
            attention: gets the keys and values of all T.
            rows: [R] int64, the rows of the result that are wanted, where it is not all: the last layer's other rows
                are nobody's input, and most of a layer is what comes after its attention. The result is [R, D].
        """
        block: DecoderLayer = self.layers[index]  # type: ignore[assignment]
        return block.forward(index, x, rotary, attention, rows)

    def stack(self) -> LayerStack | None:
        """All layers for one native call each step; None where they have to be run one by one.

        Ask once the weights are loaded and packed: the stack points at them.
        """
        if not use_native_on(self.norm.device) or self.dtype is not torch.float32 or self.config.windows:
            return None
        weights = [block.stackable() for block in self.layers if isinstance(block, DecoderLayer)]
        known = [layer for layer in weights if layer is not None]
        if not known or len(known) < len(weights):
            return None
        return LayerStack(known, self.config.heads, self.config.kv_heads, self.config.norm_eps)

    def project(self, index: int, x: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values that a layer would compute of its input [T, D], without running it."""
        block: DecoderLayer = self.layers[index]  # type: ignore[assignment]
        return block.project(x, rotary)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm and head over the rows given: [T, D] to [T, V] float32."""
        if self.config.unit_norms:
            logits: torch.Tensor = self.head(decoder_norm(x, self.norm, self.config)).float()
        else:
            logits = self.head(x, Norm(self.norm, self.config.norm_eps)).float()
        cap = self.config.logit_softcap
        return (logits / cap).tanh() * cap if cap else logits

    def weight_targets(self) -> dict[str, torch.Tensor]:
        """Views of every parameter under its Hugging Face name.

        They are ``embed_tokens.weight``, ``layers.<i>.*``, ``norm.weight`` and, unless tied, ``lm_head.weight``.
        """
        targets: dict[str, torch.Tensor] = {"embed_tokens.weight": self.embedding.weight, "norm.weight": self.norm}
        for index, block in enumerate(self.layers):
            if isinstance(block, DecoderLayer):
                targets |= {f"layers.{index}.{name}": view for name, view in block.weight_targets().items()}
        if not self.config.tie_word_embeddings:
            targets["lm_head.weight"] = self.head.weight
        return targets
