"""The decoder's shape, read from a Hugging Face text configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prismserve.core.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers.configuration_utils import PretrainedConfig

_ROPE_KINDS = ("default", "linear", "llama3")
# The hub's names of the activations between the two halves of an MLP, and ours.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Families whose attention projections carry a bias without a configuration field that says so.
_ALWAYS_QKV_BIAS = frozenset({"qwen2", "qwen2_vl_text", "qwen2_5_vl_text"})
_QK_NORM = frozenset({"qwen3", "qwen3_moe", "qwen3_vl_text", "gemma3_text"})
_MROPE = frozenset({"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"})
_MROPE_INTERLEAVED = frozenset({"qwen3_vl_text"})
_MOE = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})
_GEMMA = frozenset({"gemma3_text"})
# Models that apply a window to every layer wherever the configuration names one.
_ALWAYS_WINDOWED = frozenset({"mistral", "mixtral", "qwen3_moe"})
_TEXT_MODELS = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3",
    "qwen3_moe",
    "qwen3_vl_text",
    "gemma3_text",
)


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
class ExpertsConfig:
    """A mixture of experts in place of an MLP.

    Attributes:
        count: experts.
        per_token: experts each token goes through.
        intermediate_size: width of one expert.
        normalise: whether the chosen experts' weights are scaled to a sum of 1.
        shared_intermediate_size: width of the expert every token goes through besides; 0 for none.
        block: what the checkpoint calls the mixture inside a layer.
        parts: what it calls an expert's gate, up and down projections.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalise: bool
    shared_intermediate_size: int = 0
    block: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything the native decoder needs to know.

    Attributes:
        max_position_embeddings: usable context in tokens.
        rope_theta: base of the rotary frequencies, with ``rope_scaling``.
        local_rope_theta: base of the frequencies of layers with a window, unscaled; None where all layers share one.
        mrope_section: channel pairs that follow the time, row and column component of a position; () where positions
            have one component.
        mrope_interleaved: whether the components alternate over the channel pairs rather than following one another.
        windows: per layer, how many cache slots back a token sees, itself included; 0 is all. () is all everywhere.
        bidirectional_images: whether the tokens of one image see each other in both directions.
        experts: the mixture of experts, None for a dense model.
        sparse_layers: which layers hold it.
        unit_norms: whether norm weights are stored as their difference from 1.
        sandwich_norms: whether what attention and MLP return is normalised too.
        embedding_scale: multiplies token embeddings.
        query_scale: multiplies queries, where scores are not scaled by the root of ``head_dim``.
        logit_softcap: logits are squashed to plus and minus this by a tanh; 0 leaves them.
        deepstack_layers: leading layers after which visual features are added to the image's tokens.
    """

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
    local_rope_theta: float | None = None
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False
    windows: tuple[int, ...] = ()
    bidirectional_images: bool = False
    experts: ExpertsConfig | None = None
    sparse_layers: tuple[bool, ...] = ()
    unit_norms: bool = False
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    query_scale: float = 1.0
    logit_softcap: float = 0.0
    deepstack_layers: int = 0

    @property
    def position_scheme(self) -> str:
        """What :class:`prismserve.core.types.KVLayout` calls the positions behind the cached keys."""
        return "mrope" if self.mrope_section else "rope"

    @classmethod
    def from_hf(cls, config: PretrainedConfig, *, tie_word_embeddings: bool | None = None) -> DecoderConfig:
        """Read a text configuration of transformers.

        Args:
            config: configuration of a text model of the Llama line.
            tie_word_embeddings: overrides the text configuration where an outer configuration decides.

        Raises:
            ModelLoadError: the text model, its activation or its position scaling is not supported.
        """
        kind = config.model_type
        if kind not in _TEXT_MODELS:
            message = f"text model type {kind!r} is not supported; supported: {', '.join(_TEXT_MODELS)}"
            raise ModelLoadError(message, field="model")
        activation = config.hidden_activation if kind in _GEMMA else config.hidden_act
        if activation not in _ACTIVATIONS:
            message = f"decoder activation {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
            raise ModelLoadError(message, field="model")
        ropes = _rope_parameters(config)
        theta, scaling = _rope(ropes["full_attention"])
        attention_bias = bool(getattr(config, "attention_bias", False))
        experts, sparse = _experts(config) if kind in _MOE else (None, ())
        shape = cls(
            hidden_size=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            norm_eps=config.rms_norm_eps,
            max_position_embeddings=int(config.max_position_embeddings),
            rope_theta=theta,
            qkv_bias=kind in _ALWAYS_QKV_BIAS or bool(getattr(config, "qkv_bias", attention_bias)),
            output_bias=attention_bias and kind not in _ALWAYS_QKV_BIAS,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=kind in _QK_NORM,
            tie_word_embeddings=config.tie_word_embeddings if tie_word_embeddings is None else tie_word_embeddings,
            activation=_ACTIVATIONS[activation],
            rope_scaling=scaling,
            local_rope_theta=_local_theta(ropes),
            mrope_section=_mrope_section(ropes["full_attention"]) if kind in _MROPE else (),
            mrope_interleaved=kind in _MROPE_INTERLEAVED,
            windows=_windows(config),
            experts=experts,
            sparse_layers=sparse,
            **(_gemma(config) if kind in _GEMMA else {}),
        )
        shape.check()
        return shape

    def check(self) -> None:
        """Refuse sizes that cannot be computed with; ModelLoadError."""
        if min(self.layers, self.heads, self.kv_heads, self.head_dim, self.hidden_size, self.vocab_size) < 1:
            message = "config.json gives a decoder with a size below 1; the checkpoint's configuration is damaged"
            raise ModelLoadError(message, field="model")
        if self.heads % self.kv_heads or self.head_dim % 2:
            message = (
                f"config.json gives {self.heads} heads over {self.kv_heads} KV heads of {self.head_dim} channels; "
                "heads must be a multiple of KV heads and the channels even"
            )
            raise ModelLoadError(message, field="model")
        if self.mrope_section and (len(self.mrope_section) != 3 or sum(self.mrope_section) != self.head_dim // 2):
            message = f"mrope_section {list(self.mrope_section)} does not divide {self.head_dim // 2} channel pairs"
            raise ModelLoadError(message, field="model")


def _windows(config: PretrainedConfig) -> tuple[int, ...]:
    """Sliding windows by layer; () where no layer has one."""
    window = getattr(config, "sliding_window", None)
    if not window:
        return ()
    if config.model_type in _ALWAYS_WINDOWED:
        return (int(window),) * int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or ()
    windows = tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _experts(config: PretrainedConfig) -> tuple[ExpertsConfig, tuple[bool, ...]]:
    """The mixture, and which layers have it in place of an MLP."""
    layers = config.num_hidden_layers
    if config.model_type == "mixtral":
        parts = ("w1", "w3", "w2")
        count, width = config.num_local_experts, config.intermediate_size
        return ExpertsConfig(count, config.num_experts_per_tok, width, True, 0, "block_sparse_moe", parts), (
            True,
        ) * layers
    dense = frozenset(config.mlp_only_layers or ())
    sparse = tuple(
        layer not in dense and config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(layers)
    )
    shared = getattr(config, "shared_expert_intermediate_size", 0)
    experts = ExpertsConfig(
        config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, config.norm_topk_prob, shared
    )
    return experts, sparse


def _gemma(config: PretrainedConfig) -> dict[str, Any]:
    """What sets Gemma apart from the Llama line."""
    if config.attn_logit_softcapping:
        message = "attn_logit_softcapping is not supported"
        raise ModelLoadError(message, field="model")
    if config.use_bidirectional_attention:
        message = "a text model that reads in both directions generates nothing and is not supported"
        raise ModelLoadError(message, field="model")
    return {
        "unit_norms": True,
        "sandwich_norms": True,
        "embedding_scale": config.hidden_size**0.5,
        "query_scale": (config.head_dim / config.query_pre_attn_scalar) ** 0.5,
        "logit_softcap": float(config.final_logit_softcapping or 0.0),
    }


def _rope_parameters(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """Rotary parameters by kind of layer; at least ``full_attention``."""
    parameters: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in parameters:
        return parameters
    parameters.setdefault("rope_theta", getattr(config, "rope_theta", None))
    return {"full_attention": parameters}


def _local_theta(ropes: dict[str, dict[str, Any]]) -> float | None:
    local = ropes.get("sliding_attention")
    if local is None:
        return None
    theta, scaling = _rope(local)
    if scaling.kind != "default":
        message = f"rope scaling {scaling.kind!r} of layers with a sliding window is not supported"
        raise ModelLoadError(message, field="model")
    return theta


def _mrope_section(parameters: dict[str, Any]) -> tuple[int, ...]:
    section = parameters.get("mrope_section")
    if not isinstance(section, list | tuple) or not section:
        message = "config.json gives no mrope_section for a model whose positions have three components"
        raise ModelLoadError(message, field="model")
    return tuple(int(pairs) for pairs in section)


def _rope(parameters: dict[str, Any]) -> tuple[float, RopeScaling]:
    kind = parameters.get("rope_type", "default")
    theta = float(parameters.get("rope_theta") or 10000.0)
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
