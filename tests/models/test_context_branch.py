"""LLaMA-VID's text-guided branch beside a model: what it finds, what it refuses, and the method that needs it."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import InstructBlipVisionConfig, InstructBlipVisionModel, PreTrainedTokenizerFast

from prismserve.cluster.commands.methods import listed
from prismserve.compression.loader import normalise, visual_method
from prismserve.core.errors import InvalidRequestError, ModelLoadError
from prismserve.core.prompt import image_key
from prismserve.core.types import CompressionPlan, MediaInput, TextSegment
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.engine.explaining import explain
from prismserve.engine.image_cache import ImageCache
from prismserve.engine.vision import VisionPipeline
from prismserve.models.context_branch import ContextBranch
from prismserve.models.loader import load_model
from prismserve.models.processing import Processor
from tests.models.dense_backend import DenseBackend
from tests.models.matching import Case, Ours, picture
from tests.models.small import randomise
from tests.models.zoo import SPECIMENS, VISION

CPU = torch.device("cpu")
WIDTH, TEXT, INNER, QUERIES, DECODER, HEADS, LAYERS = 32, 24, 40, 5, 48, 2, 3
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "is", "it", "?", "what", "the", "color", "of", "sky"]
PUBLISHED = "model."
BERT = "vlm_att_encoder.bert."


def shapes():
    """What a released checkpoint has of the branch, by its names, in small."""
    found = {
        f"{BERT}embeddings.word_embeddings.weight": (len(WORDS) + 1, TEXT),
        f"{BERT}embeddings.position_embeddings.weight": (300, TEXT),
        **norm_shapes(f"{BERT}embeddings.LayerNorm", TEXT),
        "vlm_att_query": (1, QUERIES, TEXT),
        **norm_shapes("vlm_att_ln", WIDTH),
        **linear_shapes("vlm_att_projector", TEXT, WIDTH),
        **linear_shapes("vlm_att_key_projector", WIDTH, WIDTH),
        **linear_shapes("vlm_att_val_projector", WIDTH, DECODER),
    }
    for index in range(LAYERS):
        layer = f"{BERT}encoder.layer.{index}."
        for block, inputs in {"attention": TEXT, **({"crossattention": WIDTH} if index % 2 == 0 else {})}.items():
            found |= linear_shapes(f"{layer}{block}.self.query", TEXT, TEXT)
            found |= linear_shapes(f"{layer}{block}.self.key", inputs, TEXT)
            found |= linear_shapes(f"{layer}{block}.self.value", inputs, TEXT)
            found |= linear_shapes(f"{layer}{block}.output.dense", TEXT, TEXT)
            found |= norm_shapes(f"{layer}{block}.output.LayerNorm", TEXT)
        for kind in ("", "_query"):
            found |= linear_shapes(f"{layer}intermediate{kind}.dense", TEXT, INNER)
            found |= linear_shapes(f"{layer}output{kind}.dense", INNER, TEXT)
            found |= norm_shapes(f"{layer}output{kind}.LayerNorm", TEXT)
    return found


def linear_shapes(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm_shapes(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def save_branch(directory, prefix=PUBLISHED, seed=7):
    """A small branch with random weights under the released names; the weights without the prefix."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes().items()}
    directory.mkdir(exist_ok=True)
    others = {
        f"{prefix}{BERT}embeddings.position_ids": torch.arange(300)[None],
        "model.mm_projector.0.bias": torch.ones(3),
    }
    save_file(
        {**{prefix + name: tensor for name, tensor in weights.items()}, **others}, directory / "model.safetensors"
    )
    sizes = {
        "hidden_size": TEXT,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 300,
    }
    settings = {"model_type": "llava", "bert_type": "qformer_pretrain", "num_query": QUERIES, "compress_type": "mean"}
    widths = {"mm_hidden_size": WIDTH, "hidden_size": DECODER, "qformer_config": sizes}
    (directory / "config.json").write_text(json.dumps({**settings, **widths}))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    return weights


class Slow:
    """The published forward pass, one frame, one head and one row at a time."""

    def __init__(self, weights):
        self.weights = weights

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x, epsilon):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attend(self, name, x, memory):
        """An attention block of BERT, with the norm behind its addition."""
        q, k, v = (
            self.linear(f"{name}.self.{part}", rows)
            for part, rows in (("query", x), ("key", memory), ("value", memory))
        )
        size, out = TEXT // HEADS, torch.zeros_like(q)
        for head in range(HEADS):
            own = slice(head * size, (head + 1) * size)
            for row in range(len(q)):
                out[row, own] = (q[row, own] @ k[:, own].T / math.sqrt(size)).softmax(0) @ v[:, own]
        return self.norm(f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", out) + x, 1e-12)

    def feed(self, layer, kind, x):
        inner = functional.gelu(self.linear(f"{layer}intermediate{kind}.dense", x))
        return self.norm(f"{layer}output{kind}.LayerNorm", self.linear(f"{layer}output{kind}.dense", inner) + x, 1e-12)

    def queries(self, ids, seen):
        """What the Q-Former makes of its queries when it reads the text and looks at [1 + n, C]."""
        words = torch.stack([self.weights[f"{BERT}embeddings.word_embeddings.weight"][i] for i in ids])
        text = words + self.weights[f"{BERT}embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm(f"{BERT}embeddings.LayerNorm", torch.cat((self.weights["vlm_att_query"][0], text)), 1e-12)
        seen = self.norm("vlm_att_ln", seen, 1e-5)
        for index in range(LAYERS):
            layer = f"{BERT}encoder.layer.{index}."
            x = self.attend(f"{layer}attention", x, x)
            asking, text = x[:QUERIES], x[QUERIES:]
            if index % 2 == 0:
                asking = self.attend(f"{layer}crossattention", asking, seen)
            x = torch.cat((self.feed(layer, "_query", asking), self.feed(layer, "", text)))
        return x[:QUERIES]

    def context(self, ids, patches, class_token):
        """[D]: the context token of one frame."""
        asking = self.linear("vlm_att_projector", self.queries(ids, torch.cat((class_token[None], patches))))
        keys = self.linear("vlm_att_key_projector", patches)
        found = [(query @ keys.T / math.sqrt(WIDTH)).softmax(0) @ patches for query in asking]
        return self.linear("vlm_att_val_projector", torch.stack(found).mean(0))


@pytest.mark.parametrize("prefix", [PUBLISHED, ""])
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("what is the color of the sky ?", [2, 7, 4, 8, 9, 10, 8, 11, 6, 3]),
        ("", [2, 3]),
        ("what " + "it " * 253 + "? sky", [2, *[5] * 252, 6, 11, 3]),
    ],
    ids=["question", "empty", "too long"],
)
def test_it_finds_what_the_published_branch_does(text, ids, prefix, tmp_path):
    slow = Slow(save_branch(tmp_path, prefix))
    generator = torch.Generator().manual_seed(1)
    patches, class_tokens = torch.randn(2, 9, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator)
    state = torch.random.get_rng_state()
    branch = ContextBranch(tmp_path, DECODER, CPU)
    looked, context = branch.guide(text, patches, class_tokens)
    assert torch.equal(torch.random.get_rng_state(), state), "loading draws nothing"
    expected = torch.stack([slow.context(ids, patches[i], class_tokens[i]) for i in range(2)])
    assert torch.allclose(context, expected, atol=1e-4)
    assert torch.allclose(looked.sum(1), torch.ones(2), atol=1e-5)
    means = (looked[:, :, None] * patches).sum(1)
    assert torch.allclose(slow.linear("vlm_att_val_projector", means), expected, atol=1e-4)
    again = branch.guide(text, patches, class_tokens)
    assert torch.equal(again[0], looked)
    assert torch.equal(again[1], context)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    save_branch(tmp_path)
    with pytest.raises(ModelLoadError, match="gives decoder inputs 48 wide, the model's are 64"):
        ContextBranch(tmp_path, 64, CPU)
    with pytest.raises(ModelLoadError, match="reads patches 32 wide, the model's are 8"):
        ContextBranch(tmp_path, DECODER, CPU).guide("it", torch.zeros(1, 4, 8), torch.zeros(1, 8))
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    for name, message in [
        ("vlm_att_query", r"lacks 1 of .*vlm_att_query"),
        (
            f"{BERT}encoder.layer.2.crossattention.self.key.weight",
            r"lacks 1 of .*layer\.2\.crossattention\.self\.key\.weight",
        ),
        (f"{BERT}embeddings.LayerNorm.bias", r"lacks 1 of .*bert\.embeddings\.LayerNorm\.bias"),
        (
            f"{BERT}embeddings.word_embeddings.weight",
            r"lacks vlm_att_encoder\.bert\.embeddings\.word_embeddings\.weight",
        ),
    ]:
        save_file({key: tensor for key, tensor in whole.items() if key != PUBLISHED + name}, file)
        with pytest.raises(ModelLoadError, match=message):
            ContextBranch(tmp_path, DECODER, CPU)
    save_file({**whole, f"{PUBLISHED}vlm_att_projector.weight": torch.zeros(7, TEXT)}, file)
    with pytest.raises(ModelLoadError, match=r"vlm_att_projector\.weight has shape \[7, 24\]"):
        ContextBranch(tmp_path, DECODER, CPU)
    words = f"{PUBLISHED}{BERT}embeddings.word_embeddings.weight"
    save_file({**whole, words: whole[words][:5]}, file)
    with pytest.raises(ModelLoadError, match="knows 5 tokens, its tokenizer has 12"):
        ContextBranch(tmp_path, DECODER, CPU)
    save_file(whole, file)
    settings = json.loads((tmp_path / "config.json").read_text())
    for changed, message in [
        ({"bert_type": "raw_bert"}, "bert_type 'raw_bert'; supported: qformer_pretrain"),
        ({"bert_type": None}, "bert_type None"),
        ({"num_query": 0}, "num_query must be a positive integer, got 0"),
        ({"mm_hidden_size": "32"}, "mm_hidden_size must be a positive integer"),
        ({"qformer_config": {**settings["qformer_config"], "num_hidden_layers": 5}}, "lacks"),
        ({"qformer_config": {**settings["qformer_config"], "hidden_size": "wide"}}, "does not describe"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**settings, **changed}))
        with pytest.raises(ModelLoadError, match=message):
            ContextBranch(tmp_path, DECODER, CPU)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ModelLoadError, match=r"the tokenizer in .* cannot be loaded"):
        ContextBranch(tmp_path, DECODER, CPU)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A LLaVA checkpoint with EVA's tower, without the branch."""
    path = tmp_path_factory.mktemp("plain")
    model = SPECIMENS["llava"].save(path, 0)
    tower = randomise(InstructBlipVisionModel(InstructBlipVisionConfig(**VISION)), 4)
    settings = json.loads((path / "config.json").read_text())
    changed = {"vision_config": tower.config.to_dict(), "vision_feature_layer": -1}
    (path / "config.json").write_text(json.dumps({**settings, **changed}))
    state = {name: tensor for name, tensor in model.named_parameters() if "vision_tower" not in name}
    state |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.named_parameters()}
    save_file({name: tensor.detach().clone() for name, tensor in state.items()}, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def beside(plain, tmp_path_factory):
    """The same with it."""
    path = tmp_path_factory.mktemp("beside")
    for file in plain.iterdir():
        (path / file.name).symlink_to(file)
    save_branch(path / "llamavid")
    return path


def seen(directory, question, **params):
    """What the method leaves of a picture in the pipeline of an engine; the model, the inputs and the ids of the question."""
    processor, model = Processor.from_directory(directory), load_model(directory, dtype="float32")
    pipeline = VisionPipeline(model, processor, ImageCache(1 << 24))
    image = picture(1, 70, 40)
    media = MediaInput(b"", bytes(32), *image.size)
    spec = normalise(visual_method("llamavid_context"), params, "compression.visual")
    key = image_key(media.pixel_hash, processor.fingerprint, model.encoder_fingerprint, spec.fingerprint())
    inputs, scoring = processor.preprocess(image), tuple(processor.encode_text(question))
    with torch.inference_mode():
        (visual,) = pipeline.encode([key], [media], [inputs], spec, [scoring])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "llamavid")
    return visual, model, inputs, tokenizer(processor.decode(scoring)).input_ids


@pytest.mark.parametrize("grid", [1, 2])
def test_an_image_is_a_context_token_and_content_tokens(beside, grid):
    visual, model, inputs, ids = seen(beside, "What is the color of the sky?", keep=1 + grid * grid)
    weights = {
        name.removeprefix("model."): t for name, t in load_file(beside / "llamavid" / "model.safetensors").items()
    }
    with torch.inference_mode():
        (image,) = model.encode_images([inputs], frozenset({"class_token"}))
        pixels = image.tokens.view(4, 4, WIDTH).permute(2, 0, 1)[None]
        pooled = functional.avg_pool2d(pixels, kernel_size=4 // grid, stride=4 // grid)
        content = model.project(pooled.permute(0, 2, 3, 1).flatten(0, 2))
        expected = Slow(weights).context(ids, image.tokens, image.class_token)
    assert torch.allclose(visual.embeds[0], expected, atol=1e-4), "the context token stands first"
    assert torch.allclose(visual.embeds[1:], content, atol=1e-5)
    kept = 1 + grid * grid
    assert visual.positions.tolist() == list(range(16 - kept, 16)), "next to each other and to the text"


def test_the_decoder_reads_them_right_before_the_question(beside):
    ours, question = Ours(beside), "What is the color of the sky?"
    plan = CompressionPlan(visual=normalise(visual_method("llamavid_context"), {}, "compression.visual"))
    request = ours.request("r", Case(question, (picture(1, 70, 40),)), 3, plan)
    scoring = tuple(ours.processor.encode_text(question))
    tokens = ours.run([dataclasses.replace(request, scoring_token_ids=scoring)])["r"]
    decoder, (before, media, after) = ours.model.decoder, request.prompt.segments
    assert isinstance(before, TextSegment)
    assert (media.tokens, media.raw_tokens) == (2, 16)
    ids = torch.tensor([*before.token_ids, *after.token_ids, *tokens[:-1]])
    text = decoder.embed(ids)
    first = len(before.token_ids)
    x = torch.cat((text[:first], seen(beside, question)[0].embeds, text[first:]))
    rotary = decoder.rotary(torch.tensor([*range(first), *range(first + 14, len(x) + 14)]))
    backend = DenseBackend(decoder.config.layers, decoder.config.head_dim**-0.5)
    for layer in range(decoder.config.layers):
        x = decoder.layer(layer, x, rotary, backend)
    expected = decoder.logits(x)[-3:]
    assert torch.allclose(torch.stack(ours.logits["r"]), expected, atol=1e-4)
    assert expected.argmax(1).tolist() == tokens


def test_an_explanation_says_what_each_patch_went_into(beside):
    ours = Ours(beside)
    plan = CompressionPlan(visual=normalise(visual_method("llamavid_context"), {"keep": 5}, "compression.visual"))
    request = ours.request("r", Case("What is it?", (picture(1, 70, 40),)), 1, plan)
    engine = Engine(ours.model, ours.processor, EngineConfig(kv_cache_bytes=32 << 20, max_model_len=1024))
    (stage,) = explain(engine, dataclasses.replace(request, scoring_token_ids=(5, 9))).stages
    assert (stage.kept, stage.merged, stage.dropped) == (5, 11, 0)
    assert set(stage.fates) <= set(range(11, 16))


def test_only_the_context_token_depends_on_the_question(beside):
    one, other, again = (seen(beside, text)[0].embeds for text in ("the sky ?", "what color is it ?", "the sky ?"))
    assert one.shape == (2, DECODER)
    assert torch.equal(one, again)
    assert not torch.allclose(one[0], other[0], atol=1e-3)
    assert torch.equal(one[1], other[1])


def test_without_the_branch_the_method_is_refused_and_keys_are_others(plain, beside):
    without, within = Processor.from_directory(plain), Processor.from_directory(beside)
    assert within.reducible - without.reducible == {"llamavid"}
    assert without.fingerprint != within.fingerprint
    model = load_model(plain, dtype="float32")
    image = picture(1, 70, 40)
    spec = normalise(visual_method("llamavid_context"), {}, "compression.visual")
    with pytest.raises(InvalidRequestError, match="'llamavid_context' cannot act on the image tokens of this model"):
        VisionPipeline(model, without, ImageCache(1 << 20)).encode(
            [bytes(32)], [MediaInput(b"", bytes(32), *image.size)], [without.preprocess(image)], spec, [(5,)]
        )


def test_other_weights_give_other_keys(beside, tmp_path):
    for file in beside.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    save_branch(tmp_path / "llamavid")
    assert Processor.from_directory(tmp_path).fingerprint == Processor.from_directory(beside).fingerprint
    save_branch(tmp_path / "llamavid", seed=8)
    assert Processor.from_directory(tmp_path).fingerprint != Processor.from_directory(beside).fingerprint


def test_a_tower_it_was_not_trained_with_does_not_load_it(tmp_path):
    SPECIMENS["llava"].save(tmp_path, 0)
    save_branch(tmp_path / "llamavid")
    assert Processor.from_directory(tmp_path).context_branch is None


def test_the_content_tokens_alone_are_not_the_trained_method_and_say_where_that_is():
    with pytest.raises(InvalidRequestError, match="the method llamavid_context"):
        normalise(visual_method("llamavid"), {"context": True}, "compression.visual")


def test_the_list_of_methods_says_whether_it_is_loaded(plain, beside):
    def weights(model):
        return {entry["name"]: entry["weights"] for entry in listed(model)}["llamavid_context"]

    held = [weights(model) for model in (None, str(plain), str(beside), "reference")]
    assert held == ["beside the model", "not loaded", "loaded", "not loaded"]
