"""Small random checkpoints, saved the ways the hub saves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from prismserve.models.base import ImageInputs, ImageLayout
from prismserve.models.reference import reference_path
from tests.models.dense_backend import DenseBackend

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TEXT_CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied-biased": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-rope-linear": lambda: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "llama-rope-llama3": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "mistral-head-dim": lambda: MistralConfig(**SIZES, head_dim=20, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=16),
    "qwen2-window": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=11,
        sliding_window_pattern=2,
        final_logit_softcapping=3.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2),
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **SIZES, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, shared_expert_intermediate_size=40
    ),
    "qwen2-moe-some-dense": lambda: Qwen2MoeConfig(
        **SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SIZES,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}


def randomise(model, seed):
    """Weights far from their tidy initial values, so that a swapped or forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1.0 if parameter.dim() == 1 and "norm" in name and "weight" in name else noise)
    return model.eval()


def text_model(kind, seed=0):
    return randomise(AutoModelForCausalLM.from_config(TEXT_CONFIGS[kind]()), seed)


def llava_model(seed=0, *, tower="clip", text="llama", layer=-2, strategy="default"):
    config = LlavaConfig(
        vision_config=TOWERS[tower](**VISION),
        text_config=TEXT_CONFIGS[text](),
        image_token_id=3,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    return randomise(LlavaForConditionalGeneration(config), seed)


def hub_key(key):
    """The layout of the hub before transformers 4.52."""
    key = key.removeprefix("model.")
    key = key.replace("vision_tower.", "vision_tower.vision_model.", 1) if key.startswith("vision_tower.") else key
    if key.startswith("language_model."):
        return key.replace("language_model.", "language_model.model.", 1)
    return f"language_model.{key}" if key.startswith("lm_head") else key


def save(model, directory: Path, rename=lambda key: key, shards=1):
    """Write config.json and safetensors; several shards get an index."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(".experts." in name for name, _ in model.named_parameters()):
        # In memory transformers keeps experts in one tensor; the hub keeps each part of each by itself.
        model.save_pretrained(directory)
        return directory
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    (directory / "config.json").write_text(json.dumps(config))
    state = {rename(name): tensor.detach().clone() for name, tensor in model.named_parameters()}
    if shards == 1:
        save_file(state, directory / "model.safetensors")
        return directory
    names = sorted(state)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in names[shard::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def copy_reference(directory: Path):
    """A writable copy of the bundled checkpoint."""
    shutil.copytree(reference_path(), directory, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def as_inputs(model, pixels):
    """Pixels [3, height, width] as a processor would hand them over."""
    image = model.shape.image
    layout = ImageLayout(image.tokens, image.grid) if image else ImageLayout(0, (0, 0))
    return ImageInputs({"pixel_values": pixels[None]}, layout)


def embeddings(model, ids, pixels=()):
    """Token embeddings [T, D] of ids whose image placeholders are expanded."""
    x = model.decoder.embed(ids)
    encoded = model.encode_images([as_inputs(model, image) for image in pixels], frozenset())
    if encoded:
        x[ids == model.image_token_id] = torch.cat([model.project(image.tokens) for image in encoded])
    return x


def run(model, x, *, backend=None, start=0):
    """Logits [T, V] of embeddings [T, D] at positions from ``start`` on."""
    config = model.decoder.config
    backend = backend or DenseBackend(config.layers, config.head_dim**-0.5, config.windows)
    rotary = model.decoder.rotary(torch.arange(start, start + x.shape[0]))
    for layer in range(config.layers):
        x = model.decoder.layer(layer, x, rotary, backend)
    return model.decoder.logits(x)
