"""The forward pass training runs, written out over the parameters of the Hugging Face modules.

``torch.compile`` fuses this form well on a CPU. Compute is bfloat16, or float32 where the processor is slow at it, over
float32 weights, with norms, softmax and rotary phases in float32. :func:`check_forward` proves that it computes what the
Hugging Face forward computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F

from prismserve.core.errors import ConfigurationError
from prismserve.models.reference.build import ASSISTANT, IMAGE, PIXEL_MEAN, PIXEL_STD, USER
from prismserve.models.reference.scenes import Scene
from prismserve.models.reference.vocabulary import IMAGE_TOKENS

COMPUTE: Final = torch.bfloat16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else torch.float32
"""What is computed in: processors without AVX-512 multiply bfloat16 ten times slower than float32."""
PREFIX_TOKENS: Final = 1 + IMAGE_TOKENS
"""Positions before the first question: the user token and the image."""
HIDDEN: Final = -1e4
"""Added to a score that must not be seen."""
ERROR_MAX: Final = 0.03

Seen = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What :func:`vision` returns."""


def _linear(x: torch.Tensor, layer: Any) -> torch.Tensor:
    bias = layer.bias
    return F.linear(x, layer.weight.to(COMPUTE), None if bias is None else bias.to(COMPUTE))


def _layer_norm(x: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), norm.weight, norm.bias, norm.eps).to(COMPUTE)


def _rms_norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    x = x.float()
    scaled: torch.Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight
    return scaled.to(COMPUTE)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """[B, 224, 224, 3] uint8 to float32 of CLIP's mean and deviation."""
    return (pixels.float() / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)


def vision(tower: Any, pixels: torch.Tensor) -> Seen:
    """Run the vision tower.

    Args:
        tower: a ``CLIPVisionModel``'s transformer.
        pixels: [B, 224, 224, 3] uint8.

    Returns:
        patches [B, 196, C] of the last layer; the class token after the post-norm, [B, C]; the attention it pays to
        the patches in each layer, mean of the heads, [layers, B, 196] float32.
    """
    c, e = tower.config, tower.embeddings
    patch, grid, heads, batch = c.patch_size, c.image_size // c.patch_size, c.num_attention_heads, pixels.shape[0]
    head_dim = c.hidden_size // heads
    x = normalise(pixels).to(COMPUTE)
    x = x.view(batch, grid, patch, grid, patch, 3).permute(0, 1, 3, 5, 2, 4).reshape(batch, grid * grid, -1)
    x = F.linear(x, e.patch_embedding.weight.to(COMPUTE).view(c.hidden_size, -1))
    x = torch.cat([e.class_embedding.to(COMPUTE).expand(batch, 1, -1), x], 1).float() + e.position_embedding.weight
    x = _layer_norm(x, tower.pre_layrnorm)
    looks = []
    for layer in tower.encoder.layers:
        h, a = _layer_norm(x, layer.layer_norm1), layer.self_attn
        q, k, v = (
            _linear(h, m).view(batch, -1, heads, head_dim).transpose(1, 2) for m in (a.q_proj, a.k_proj, a.v_proj)
        )
        weights = (torch.matmul(q, k.transpose(-1, -2)).float() * head_dim**-0.5).softmax(-1)
        looks.append(weights[:, :, 0, 1:].mean(1))
        mixed = torch.matmul(weights.to(COMPUTE), v).transpose(1, 2).reshape(batch, -1, c.hidden_size)
        x = x + _linear(mixed, a.out_proj)
        h = _linear(_layer_norm(x, layer.layer_norm2), layer.mlp.fc1)
        x = x + _linear(h * torch.sigmoid(1.702 * h), layer.mlp.fc2)
    return x[:, 1:], _layer_norm(x[:, 0], tower.post_layernorm), torch.stack(looks)


def project(projector: Any, patches: torch.Tensor) -> torch.Tensor:
    """[B, N, C] patches to [B, N, D] embeddings of the text model."""
    return _linear(F.gelu(_linear(patches, projector.linear_1)), projector.linear_2)


def embed(lm: Any, image_tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings of [user][image tokens [B, N, D]][text ids [B, T]]: [B, 1 + N + T, D]."""
    table = lm.embed_tokens.weight.to(COMPUTE)
    return torch.cat([table[USER].expand(ids.shape[0], 1, -1), image_tokens, F.embedding(ids, table)], 1)


def text(lm: Any, x: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Run the decoder.

    Args:
        lm: a ``Qwen2Model``.
        x: [B, T, D] embeddings.
        mask: [B, 1, T, T], added to the scores.
        positions: [B, T].

    Returns:
        [B, T, D] after the final norm.
    """
    return final_norm(lm, blocks(lm.config, lm.layers, x, mask, positions))


def final_norm(lm: Any, x: torch.Tensor) -> torch.Tensor:
    """What the head of a ``Qwen2Model`` reads, from what its last layer gives."""
    return _rms_norm(x, lm.norm)


def blocks(c: Any, layers: Iterable[Any], x: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Run some of the decoder's layers; arguments as for :func:`text`, ``c`` being its configuration."""
    batch, n, _ = x.shape
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    dim = c.hidden_size // heads
    angle = positions[:, None, :, None].float() / c.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    cos, sin = angle.cos(), angle.sin()

    def rotate(t: torch.Tensor) -> torch.Tensor:
        a, b = t.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(COMPUTE)

    for layer in layers:
        h, a = _rms_norm(x, layer.input_layernorm), layer.self_attn
        q = rotate(_linear(h, a.q_proj).view(batch, n, heads, dim).transpose(1, 2))
        k = rotate(_linear(h, a.k_proj).view(batch, n, kv_heads, dim).transpose(1, 2))
        v = _linear(h, a.v_proj).view(batch, n, kv_heads, dim).transpose(1, 2)
        scores = torch.matmul(q.reshape(batch, kv_heads, -1, dim), k.transpose(-1, -2)).view(batch, heads, n, n)
        weights = (scores.float() * dim**-0.5 + mask).softmax(-1).to(COMPUTE)
        mixed = torch.matmul(weights.view(batch, kv_heads, -1, n), v).view(batch, heads, n, dim)
        x = x + _linear(mixed.transpose(1, 2).reshape(batch, n, -1), a.o_proj)
        h = _rms_norm(x, layer.post_attention_layernorm)
        gate, up = _linear(h, layer.mlp.gate_proj), _linear(h, layer.mlp.up_proj)
        x = x + _linear(F.silu(gate) * up, layer.mlp.down_proj)
    return x


def check_forward(model: Any) -> float:
    """Compare with the Hugging Face forward on two scenes.

    Args:
        model: a float32 ``LlavaForConditionalGeneration`` of this architecture.

    Returns:
        The larger mean relative error of the decoder's output and of the class token.

    Raises:
        ConfigurationError: they differ by more than bfloat16 rounding explains; the installed transformers computes
            something this file does not.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(Scene(seed).image) for seed in range(2)]))
    ids = torch.tensor([[USER] + [IMAGE] * IMAGE_TOKENS + [40, 41, 42, ASSISTANT]] * 2)
    n = ids.shape[1]
    with torch.no_grad():
        m = model.model
        values = normalise(pixels).permute(0, 3, 1, 2)
        want = m(input_ids=ids, pixel_values=values).last_hidden_state
        want_pooled = m.vision_tower(pixel_values=values).pooler_output
        patches, pooled, _ = vision(m.vision_tower, pixels)
        x = embed(m.language_model, project(m.multi_modal_projector, patches), ids[:, PREFIX_TOKENS:])
        mask = torch.zeros(1, 1, n, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), HIDDEN)
        got = text(m.language_model, x, mask, torch.arange(n)[None].expand(2, n)).float()
    pairs = ((want, got), (want_pooled, pooled.float()))
    error = max(float((a - b).abs().mean() / a.abs().mean()) for a, b in pairs)
    if error > ERROR_MAX:
        message = f"the training forward pass differs from transformers' by {error:.3f}, more than {ERROR_MAX}"
        raise ConfigurationError(message)
    return error
