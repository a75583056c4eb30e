"""FlexSelect's selector beside a model: what it ranks by, what it refuses, and the method that needs it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2Model

from prismserve.cluster.commands.methods import listed
from prismserve.compression.loader import normalise, visual_method
from prismserve.core.errors import InvalidRequestError, ModelLoadError
from prismserve.core.prompt import image_key
from prismserve.core.types import MediaInput
from prismserve.engine.image_cache import ImageCache
from prismserve.engine.questioning import QuestionAttention
from prismserve.engine.vision import VisionPipeline
from prismserve.models.base import ImageLayout
from prismserve.models.loader import load_model
from prismserve.models.processing import Processor
from prismserve.models.reference import reference_path
from prismserve.models.reference.scenes import make_scene
from prismserve.models.token_selector import TokenSelector

CPU = torch.device("cpu")
WIDTH = 32


def save_selector(directory, patches, vocabulary=300):
    """A small selector with random weights in the published layout; the Qwen2 it holds, and its projector."""
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        initializer_range=0.3,
    )
    model = Qwen2Model(config).eval()
    projector = torch.nn.Sequential(torch.nn.Linear(patches, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH))
    model.save_pretrained(directory)
    weights = {**load_file(directory / "model.safetensors"), "image_newline": torch.zeros(WIDTH)}
    weights |= {f"mm_projector.{name}": tensor.detach() for name, tensor in projector.state_dict().items()}
    save_file(weights, directory / "model.safetensors")
    return model, projector


def slow(model, projector, patches, ids, reduction):
    """Attention of the last layer as transformers writes it out, from rows of the text to patches."""
    with torch.no_grad():
        entering = torch.cat((projector(patches), model.embed_tokens(ids)))
        attention = model(inputs_embeds=entering[None], output_attentions=True).attentions[-1][0]
    rows = attention[:, len(patches) :, : len(patches)].flatten(0, 1)
    return rows.mean(0) if reduction == "mean" else rows.amax(0)


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_it_ranks_by_what_the_last_layer_looks_at(tmp_path, reduction):
    model, projector = save_selector(tmp_path, 12)
    selector = TokenSelector(tmp_path, 300, CPU, torch.float32)
    patches, ids = torch.randn(20, 12), torch.tensor([5, 17, 299])
    layout = ImageLayout(20, (4, 5))
    with torch.inference_mode():
        seen = QuestionAttention(selector.decoder, layout, selector.project(patches), None, selector.decoder.embed(ids))
        scores = seen(selector.depth, reduction)
    assert torch.allclose(scores, slow(model, projector, patches, ids, reduction), atol=1e-6)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    save_selector(tmp_path, 12)
    with pytest.raises(ModelLoadError, match="12 wide, the model's are 8"):
        TokenSelector(tmp_path, 300, CPU, torch.float32).project(torch.randn(5, 8))
    with pytest.raises(ModelLoadError, match="knows 300 tokens, the model has 301"):
        TokenSelector(tmp_path, 301, CPU, torch.float32)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    for name, message in [
        ("layers.2.self_attn.k_proj.weight", r"lacks 1 of .*layers\.2\.self_attn\.k_proj\.weight"),
        ("mm_projector.0.weight", r"lacks mm_projector\.0\.weight"),
        ("mm_projector.2.bias", r"lacks 1 of .*mm_projector\.2\.bias"),
    ]:
        save_file({key: tensor for key, tensor in whole.items() if key != name}, file)
        with pytest.raises(ModelLoadError, match=message):
            TokenSelector(tmp_path, 300, CPU, torch.float32)
    save_file({**whole, "layers.0.mlp.up_proj.weight": torch.zeros(7, WIDTH)}, file)
    with pytest.raises(ModelLoadError, match=r"layers\.0\.mlp\.up_proj\.weight has shape \[7, 32\]"):
        TokenSelector(tmp_path, 300, CPU, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelLoadError, match="no token selector of type 'qwen2'"):
        TokenSelector(tmp_path, 300, CPU, torch.float32)


@pytest.fixture
def beside(tmp_path):
    """The bundled model with a selector beside it."""
    for file in reference_path().iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((reference_path() / "config.json").read_text())
    save_selector(tmp_path / "token_selector", config["vision_config"]["hidden_size"], 1000)
    return tmp_path


def kept(directory, question):
    """What ``flexselect_lite`` leaves of a scene in the pipeline of an engine: decoder inputs and places."""
    processor, model = Processor.from_directory(directory), load_model(directory, dtype="float32")
    pipeline = VisionPipeline(model, processor, ImageCache(1 << 24))
    image = make_scene(11)[0].convert("RGB")
    media = MediaInput(b"", bytes(32), *image.size)
    spec = normalise(visual_method("flexselect_lite"), {"keep": 9}, "compression.visual")
    key = image_key(media.pixel_hash, processor.fingerprint, model.encoder_fingerprint, spec.fingerprint())
    scoring = tuple(processor.encode_text(question))
    with torch.inference_mode():
        (visual,) = pipeline.encode([key], [media], [processor.preprocess(image)], spec, [scoring])
    return visual


def test_the_method_asks_the_selector_beside_the_model(beside):
    red, blue = kept(beside, "how many red shapes ?"), kept(beside, "blue")
    assert len(red.embeds) == len(red.positions) == 9
    assert not torch.equal(red.positions, blue.positions)
    assert torch.equal(red.embeds, kept(beside, "how many red shapes ?").embeds)
    even = kept(beside, "").positions
    assert int(even.diff().max() - even.diff().min()) <= 1, "no question, no ranking"


def test_without_a_selector_the_method_is_refused_and_keys_are_others(beside):
    plain, selecting = (Processor.from_directory(path) for path in (reference_path(), beside))
    assert "token_selector" in selecting.reducible - plain.reducible
    assert plain.fingerprint != selecting.fingerprint
    with pytest.raises(InvalidRequestError, match="flexselect_lite"):
        kept(reference_path(), "red")


def test_the_list_of_methods_says_whether_it_is_loaded(beside):
    def weights(model):
        return {entry["name"]: entry["weights"] for entry in listed(model)}["flexselect_lite"]

    assert [weights(model) for model in (None, "reference", str(beside))] == [
        "beside the model",
        "not loaded",
        "loaded",
    ]
