"""CLIP's text tower beside a model: what it computes, what it refuses, and a method that needs it."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from prismserve.compression.loader import normalise, visual_method
from prismserve.core.errors import InvalidRequestError, ModelLoadError
from prismserve.core.prompt import image_key
from prismserve.core.types import MediaInput
from prismserve.engine.image_cache import ImageCache
from prismserve.engine.vision import VisionPipeline
from prismserve.models.loader import load_model
from prismserve.models.processing import Processor
from prismserve.models.reference import reference_path
from prismserve.models.reference.scenes import make_scene
from prismserve.models.text_tower import TextTower

WORDS = ["<s>", "</s>", "<unk>", "red", "blue", "shapes", "how", "many", "?"]
CPU = torch.device("cpu")


def save_clip(directory, width):
    """A small CLIP with random weights and a vocabulary of a few words."""
    torch.manual_seed(3)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": 8,
        "max_position_embeddings": 7,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = CLIPConfig(
        text_config={**small, **text, "pad_token_id": 1},
        vision_config={**small, "hidden_size": width, "image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        model.vision_model.post_layernorm.weight.normal_()
        model.vision_model.post_layernorm.bias.normal_()
    model.save_pretrained(directory)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(directory)
    return model


def test_patches_and_text_are_what_clip_makes_of_them(tmp_path):
    model = save_clip(tmp_path, 12)
    tower = TextTower(tmp_path, CPU)
    patches = torch.randn(5, 12)
    with torch.inference_mode():
        expected = model.visual_projection(model.vision_model.post_layernorm(patches))
        embeds = model.text_projection(model.text_model(torch.tensor([[6, 7, 3, 5]])).pooler_output)
    assert torch.allclose(tower.patches(patches), expected, atol=1e-6)
    assert torch.allclose(tower.text("how many red shapes"), embeds, atol=1e-6)
    assert tower.text("red " * 50).shape == (1, 6)
    assert tower.text(" ").shape == (0, 6)


def test_another_vision_tower_and_damaged_folders_are_refused(tmp_path):
    save_clip(tmp_path, 12)
    with pytest.raises(ModelLoadError, match="12 wide, that of the model 8"):
        TextTower(tmp_path, CPU).patches(torch.randn(5, 8))
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelLoadError, match=r"lacks vision_model\.post_layernorm\.weight"):
        TextTower(tmp_path, CPU)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelLoadError, match="no CLIP checkpoint"):
        TextTower(tmp_path, CPU)


@pytest.fixture
def beside(tmp_path):
    """The bundled model with a text tower beside it."""
    for file in reference_path().iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    width = json.loads((reference_path() / "config.json").read_text())["vision_config"]["hidden_size"]
    save_clip(tmp_path / "text_tower", width)
    return tmp_path


def embedded(directory, question):
    """What ``trim`` makes of a scene in the pipeline of an engine."""
    processor, model = Processor.from_directory(directory), load_model(directory, dtype="float32")
    pipeline = VisionPipeline(model, processor, ImageCache(1 << 24))
    image = make_scene(11)[0].convert("RGB")
    media = MediaInput(b"", bytes(32), *image.size)
    spec = normalise(visual_method("trim"), {"keep": 9}, "compression.visual")
    key = image_key(media.pixel_hash, processor.fingerprint, model.encoder_fingerprint, spec.fingerprint())
    scoring = tuple(processor.encode_text(question))
    (visual,) = pipeline.encode([key], [media], [processor.preprocess(image)], spec, [scoring])
    return visual


def test_trim_asks_the_tower_beside_the_model(beside):
    red, blue = embedded(beside, "how many red shapes ?"), embedded(beside, "blue")
    assert len(red.embeds) == len(red.positions) == 9
    assert not torch.equal(red.positions, blue.positions)
    assert torch.equal(red.embeds, embedded(beside, "how many red shapes ?").embeds)


def test_without_a_tower_trim_is_refused_and_keys_are_others(beside):
    plain, towered = (Processor.from_directory(path) for path in (reference_path(), beside))
    assert "text_tower" in towered.reducible - plain.reducible
    assert plain.fingerprint != towered.fingerprint
    with pytest.raises(InvalidRequestError, match="trim"):
        embedded(reference_path(), "red")
