from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import InstructBlipVisionConfig, InstructBlipVisionModel

from prismserve.core.errors import EngineError, ModelLoadError
from prismserve.models import vision
from prismserve.models.base import NEED_CLASS_TOKEN, NEED_CLS_ATTENTION, NEED_ENCODER_KEYS
from prismserve.models.loader import load_model
from tests.models.small import VISION, as_inputs, llava_model, randomise, save, text_model

BOTH = frozenset({NEED_CLS_ATTENTION, NEED_ENCODER_KEYS})


def eager_attention(theirs, pixels, depth):
    """[H, N, N] attention and [N, H, d] keys of the layer that makes hidden state ``depth``."""
    tower = theirs.model.vision_tower
    tower.set_attn_implementation("eager")
    out = tower(pixels[None], output_attentions=True, output_hidden_states=True)
    layer = tower.encoder.layers[depth - 1]
    keys = layer.self_attn.k_proj(layer.layer_norm1(out.hidden_states[depth - 1]))[0]
    return out.attentions[depth - 1][0], keys.view(keys.shape[0], 4, -1)


@pytest.fixture
def pixels():
    return torch.randn(3, 32, 32)


@pytest.mark.parametrize(("layer", "depth"), [(-1, 4), (-2, 3), (1, 1), ([-3, 1], 2)])
def test_class_token_attention_and_keys_are_those_of_the_layer_read(tmp_path, pixels, layer, depth):
    theirs = llava_model(3, layer=layer)
    ours = load_model(save(theirs, tmp_path), dtype="float32")
    (image,) = ours.encode_images([as_inputs(ours, pixels)], BOTH)
    attention, keys = eager_attention(theirs, pixels, depth)
    assert image.cls_attention.dtype == torch.float32
    torch.testing.assert_close(image.cls_attention, attention[:, 0, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(image.keys, keys[1:], rtol=0, atol=1e-5)
    assert image.grid == (4, 4)


def save_eva(directory, layer=-1):
    """A LLaVA checkpoint whose tower is EVA's in place of CLIP's; that tower in transformers."""
    model = llava_model(3, layer=layer)
    tower = randomise(InstructBlipVisionModel(InstructBlipVisionConfig(**VISION)), 4)
    save(model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vision_config": tower.config.to_dict()}))
    state = {name: tensor for name, tensor in model.named_parameters() if "vision_tower" not in name}
    state |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.named_parameters()}
    save_file({name: tensor.detach().clone() for name, tensor in state.items()}, directory / "model.safetensors")
    return tower


@pytest.mark.parametrize(("layer", "depth"), [(-1, 4), (2, 2)])
def test_eva_gives_patches_and_the_class_token_beside_them(tmp_path, pixels, layer, depth):
    tower = save_eva(tmp_path, layer)
    ours = load_model(tmp_path, dtype="float32")
    assert ours.shape.image.reducible == {*BOTH, NEED_CLASS_TOKEN}
    (image,) = ours.encode_images([as_inputs(ours, pixels)], frozenset({NEED_CLASS_TOKEN}))
    (tapped,) = ours.encode_images([as_inputs(ours, pixels)], BOTH)
    hidden = tower.embeddings(pixels[None])
    for encoder_layer in tower.encoder.layers[: depth - 1]:
        hidden = encoder_layer(hidden)
    attention = tower.encoder.layers[depth - 1].self_attn
    queries, keys, _ = attention.qkv(tower.encoder.layers[depth - 1].layer_norm1(hidden))[0].split(32, -1)
    queries, keys = queries.view(17, 4, 8), keys.view(17, 4, 8)
    hidden = tower.encoder.layers[depth - 1](hidden)
    torch.testing.assert_close(image.tokens, hidden[0, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(image.class_token, hidden[0, 0], rtol=0, atol=1e-5)
    assert (image.cls_attention, image.keys, tapped.class_token) == (None, None, None)
    torch.testing.assert_close(tapped.tokens, image.tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(tapped.keys, keys[1:], rtol=0, atol=1e-5)
    seen = (torch.einsum("hd,nhd->hn", queries[0], keys) * 8**-0.5).softmax(-1)
    torch.testing.assert_close(tapped.cls_attention, seen[:, 1:], rtol=0, atol=1e-5)


def test_only_llava_takes_eva(tmp_path):
    save_eva(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]})
    )
    with pytest.raises(ModelLoadError, match="'instructblip_vision_model' is not supported"):
        load_model(tmp_path, dtype="float32")


@pytest.mark.parametrize("tile_rows", [1, 5, 128])
def test_without_class_token_salience_is_the_mean_attention_received(tmp_path, pixels, monkeypatch, tile_rows):
    monkeypatch.setattr(vision, "_TILE_ROWS", tile_rows)
    theirs = llava_model(3, tower="siglip", layer=-1, strategy="full")
    ours = load_model(save(theirs, tmp_path), dtype="float32")
    (image,) = ours.encode_images([as_inputs(ours, pixels)], BOTH)
    attention, keys = eager_attention(theirs, pixels, 4)
    torch.testing.assert_close(image.cls_attention, attention.mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(image.keys, keys, rtol=0, atol=1e-5)


def test_only_what_is_asked_for_is_computed(tmp_path, pixels):
    ours = load_model(save(llava_model(), tmp_path), dtype="float32")
    (plain,) = ours.encode_images([as_inputs(ours, pixels)], frozenset())
    (attention,) = ours.encode_images([as_inputs(ours, pixels)], frozenset({NEED_CLS_ATTENTION}))
    (keys,) = ours.encode_images([as_inputs(ours, pixels)], frozenset({NEED_ENCODER_KEYS}))
    assert (plain.cls_attention, plain.keys) == (None, None)
    assert attention.cls_attention is not None
    assert attention.keys is None
    assert keys.cls_attention is None
    assert keys.keys is not None
    for tapped in (attention, keys):
        torch.testing.assert_close(tapped.tokens, plain.tokens, rtol=0, atol=1e-5)


def test_an_images_features_do_not_depend_on_its_neighbours(tmp_path, pixels):
    ours = load_model(save(llava_model(), tmp_path), dtype="float32")
    alone = ours.encode_images([as_inputs(ours, pixels)], BOTH)[0]
    among = ours.encode_images(
        [as_inputs(ours, torch.randn(3, 32, 32)), as_inputs(ours, pixels), as_inputs(ours, torch.randn(3, 32, 32))],
        BOTH,
    )[1]
    assert torch.equal(alone.tokens, among.tokens)
    assert torch.equal(alone.cls_attention, among.cls_attention)


def test_layers_behind_the_one_read_are_not_built(tmp_path):
    ours = load_model(save(llava_model(layer=-3), tmp_path), dtype="float32")
    assert len(ours.tower.layers) == VISION["num_hidden_layers"] - 2


def test_a_text_model_refuses_images(tmp_path, pixels):
    ours = load_model(save(text_model("llama"), tmp_path), dtype="float32")
    assert ours.encode_images([], BOTH) == []
    with pytest.raises(EngineError, match="text only"):
        ours.encode_images([as_inputs(ours, pixels)], frozenset())
    with pytest.raises(EngineError, match="text only"):
        ours.project(torch.zeros(1, 48))


@pytest.mark.parametrize(
    ("tower", "layer", "strategy", "reason"),
    [
        ("clip", -6, "default", "does not fit a tower of 4 layers"),
        ("clip", 5, "default", "does not fit a tower of 4 layers"),
        ("clip", 0, "default", "does not fit a tower of 4 layers"),
        ("siglip", -1, "default", "does not have"),
    ],
)
def test_a_tower_that_cannot_be_read_as_configured_is_refused(tower, layer, strategy, reason):
    config = llava_model(tower=tower).config
    with pytest.raises(ModelLoadError, match=reason):
        vision.TowerPlan.read(config.vision_config, layer, strategy)


def test_an_unknown_tower_is_refused_with_the_supported_ones():
    config = text_model("llama").config
    with pytest.raises(ModelLoadError, match="clip_vision_model, siglip_vision_model"):
        vision.TowerPlan.read(config, -1, "default")
