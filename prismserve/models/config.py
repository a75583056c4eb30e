"""The decoder's shape, read from a Hugging Face text configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prismserve.core.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers.configuration_utils import PretrainedConfig

_ROPE_KINDS = ("default", "linear", "llama3")
_ACTIVATIONS = ("silu",)
# Families whose attention projections carry a bias without a configuration field that says so.
_ALWAYS_QKV_BIAS = frozenset({"qwen2"})
_QK_NORM = frozenset({"qwen3"})
_TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    Attributes:
        kind: ``default`` (not at all), ``linear`` (every frequency divided by ``factor``) or ``llama3``.
        factor: stretch of the low frequencies.
        low_freq_factor: ``llama3`` only: longer waves than ``original_context / low_freq_factor`` are stretched.
        high_freq_factor: ``llama3`` only: shorter waves than ``original_context / high_freq_factor`` are not.
        original_context: ``llama3`` only: context in tokens before stretching.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything the native decoder needs to know. ``max_position_embeddings`` is the usable context in tokens."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    activation: str = "silu"
    rope_scaling: RopeScaling = RopeScaling()

    @classmethod
    def from_hf(cls, config: PretrainedConfig, *, tie_word_embeddings: bool | None = None) -> DecoderConfig:
        """Read a text configuration of transformers.

        Args:
            config: configuration of a Llama, Mistral, Qwen2 or Qwen3 text model.
            tie_word_embeddings: overrides the text configuration where an outer configuration decides.

        Raises:
            ModelLoadError: the text model, its activation or its position scaling is not supported.
        """
        kind = config.model_type
        if kind not in _TEXT_MODELS:
            message = f"text model type {kind!r} is not supported; supported: {', '.join(_TEXT_MODELS)}"
            raise ModelLoadError(message, field="model")
        if config.hidden_act not in _ACTIVATIONS:
            message = f"decoder activation {config.hidden_act!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
            raise ModelLoadError(message, field="model")
        theta, scaling = _rope(config)
        attention_bias = bool(getattr(config, "attention_bias", False))
        shape = cls(
            hidden_size=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            norm_eps=config.rms_norm_eps,
            max_position_embeddings=_context(config),
            rope_theta=theta,
            qkv_bias=kind in _ALWAYS_QKV_BIAS or attention_bias,
            output_bias=attention_bias and kind not in _ALWAYS_QKV_BIAS,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=kind in _QK_NORM,
            tie_word_embeddings=config.tie_word_embeddings if tie_word_embeddings is None else tie_word_embeddings,
            activation=config.hidden_act,
            rope_scaling=scaling,
        )
        if min(shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.hidden_size, shape.vocab_size) < 1:
            message = "config.json gives a decoder with a size below 1; the checkpoint's configuration is damaged"
            raise ModelLoadError(message, field="model")
        if shape.heads % shape.kv_heads or shape.head_dim % 2:
            message = (
                f"config.json gives {shape.heads} heads over {shape.kv_heads} KV heads of {shape.head_dim} channels; "
                "heads must be a multiple of KV heads and the channels even"
            )
            raise ModelLoadError(message, field="model")
        return shape


def _context(config: PretrainedConfig) -> int:
    """Usable context: a sliding window, where one is active, is a limit within which attention is exact."""
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    return min(context, int(window)) if window else context


def _rope(config: PretrainedConfig) -> tuple[float, RopeScaling]:
    parameters: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    kind = parameters.get("rope_type", "default")
    theta = float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    if kind not in _ROPE_KINDS:
        message = f"rope scaling {kind!r} is not supported; supported: {', '.join(_ROPE_KINDS)}"
        raise ModelLoadError(message, field="model")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        message = "a partial_rotary_factor other than 1 is not supported"
        raise ModelLoadError(message, field="model")
    if kind == "default":
        return theta, RopeScaling()
    missing = sorted({"factor"} - parameters.keys())
    if kind == "llama3":
        wanted = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        missing = sorted(wanted - parameters.keys())
    if missing:
        message = f"rope scaling {kind!r} in config.json lacks {', '.join(missing)}"
        raise ModelLoadError(message, field="model")
    if kind == "linear":
        return theta, RopeScaling(kind, float(parameters["factor"]))
    return theta, RopeScaling(
        kind,
        float(parameters["factor"]),
        float(parameters["low_freq_factor"]),
        float(parameters["high_freq_factor"]),
        int(parameters["original_max_position_embeddings"]),
    )
