from __future__ import annotations

import pytest
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from prismserve.core.errors import ModelLoadError
from prismserve.models.config import DecoderConfig
from tests.models.small import LLAMA3_ROPE, SIZES


def test_families_differ_by_their_biases_and_norms():
    llama, qwen2, qwen3 = (DecoderConfig.from_hf(kind(**SIZES)) for kind in (LlamaConfig, Qwen2Config, Qwen3Config))
    assert (llama.qkv_bias, llama.output_bias, llama.qk_norm) == (False, False, False)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.qk_norm) == (False, False, True)


def test_head_size_follows_the_configuration_or_the_hidden_size():
    assert DecoderConfig.from_hf(LlamaConfig(**SIZES)).head_dim == 12
    assert DecoderConfig.from_hf(Qwen3Config(**SIZES, head_dim=32)).head_dim == 32


def test_a_sliding_window_is_kept_by_layer_where_it_is_active():
    assert DecoderConfig.from_hf(MistralConfig(**SIZES, sliding_window=64)).windows == (64, 64, 64)
    assert DecoderConfig.from_hf(MistralConfig(**SIZES, sliding_window=None)).windows == ()
    assert DecoderConfig.from_hf(Qwen2Config(**SIZES, sliding_window=64)).windows == ()
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=64, max_window_layers=2)
    assert DecoderConfig.from_hf(config).windows == (0, 0, 64)


def test_rope_scaling_is_read():
    scaling = DecoderConfig.from_hf(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)).rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_context) == ("llama3", 8.0, 32)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config, "text model type 'gpt2' is not supported"),
        (lambda: LlamaConfig(**SIZES, hidden_act="gelu"), "activation 'gelu' is not supported"),
        (
            lambda: LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
            "rope scaling 'yarn' is not supported; supported: default, linear, llama3",
        ),
        (lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 3}), "4 heads over 3 KV heads"),
        (lambda: LlamaConfig(**SIZES, head_dim=3), "of 3 channels"),
        (lambda: LlamaConfig(**SIZES | {"num_hidden_layers": 0}), "below 1"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused(config, reason):
    with pytest.raises(ModelLoadError, match=reason):
        DecoderConfig.from_hf(config())
