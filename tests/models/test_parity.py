"""The native models against transformers, logit for logit in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from prismserve.models.loader import load_model
from prismserve.models.reference import reference_path
from tests.models.dense_backend import DenseBackend
from tests.models.small import TEXT_CONFIGS, embeddings, hub_key, llava_model, run, save, text_model

TOLERANCE = {"rtol": 0, "atol": 1e-4}


def token_ids(seed, tokens=21, vocabulary=96):
    return torch.randint(4, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))


def expanded(count, visual, seed=0):
    """Text with ``count`` images of ``visual`` placeholders in it."""
    pieces = [token_ids(seed, 5)]
    for image in range(count):
        pieces += [torch.full((visual,), 3), token_ids(seed + image + 1, 4)]
    return torch.cat(pieces)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", TEXT_CONFIGS)
def test_text_models_give_the_logits_of_transformers(tmp_path, kind, seed):
    theirs = text_model(kind, seed)
    ours = load_model(save(theirs, tmp_path), dtype="float32")
    ids = token_ids(seed, 60)
    with torch.inference_mode():
        torch.testing.assert_close(run(ours, embeddings(ours, ids)), theirs(ids[None]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("rename", [lambda key: key, hub_key], ids=["current", "hub"])
@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_llava_gives_the_logits_of_transformers_in_both_key_layouts(tmp_path, rename, images, seed):
    theirs = llava_model(seed)
    ours = load_model(save(theirs, tmp_path, rename, shards=2), dtype="float32")
    ids = expanded(images, 16, seed)
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected = theirs(ids[None], pixel_values=pixels if images else None).logits[0]
        torch.testing.assert_close(run(ours, embeddings(ours, ids, pixels)), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("tower", "layer", "strategy", "visual"),
    [
        ("clip", -1, "default", 16),
        ("clip", 2, "default", 16),
        ("clip", [-2, -1, 1], "default", 16),
        ("clip", -2, "full", 17),
        ("siglip", -1, "full", 16),
        ("siglip", [0, -2], "full", 16),
    ],
)
@pytest.mark.parametrize("text", ["qwen2", "llama-tied-biased"])
def test_llava_reads_the_tower_layers_its_configuration_names(tmp_path, tower, layer, strategy, visual, text):
    theirs = llava_model(5, tower=tower, text=text, layer=layer, strategy=strategy)
    ours = load_model(save(theirs, tmp_path), dtype="float32")
    assert ours.shape.image.tokens == visual
    ids = expanded(2, visual)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(ids[None], pixel_values=pixels).logits[0]
        torch.testing.assert_close(run(ours, embeddings(ours, ids, pixels)), expected, **TOLERANCE)


def test_reference_model_gives_the_logits_and_greedy_tokens_of_transformers():
    theirs = LlavaForConditionalGeneration.from_pretrained(reference_path(), dtype=torch.float32).eval()
    ours = load_model(reference_path(), dtype="float32")
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ids = torch.cat((torch.tensor([4]), torch.full((196,), 3), torch.tensor([289, 375, 276, 266, 323, 38, 5])))
    with torch.inference_mode():
        logits = run(ours, embeddings(ours, ids, pixels))
        torch.testing.assert_close(logits, theirs(ids[None], pixel_values=pixels).logits[0], **TOLERANCE)
        generated = theirs.generate(
            input_ids=ids[None], pixel_values=pixels, max_new_tokens=16, min_new_tokens=16, do_sample=False
        )[0, len(ids) :].tolist()
        config = ours.decoder.config
        backend = DenseBackend(config.layers, config.head_dim**-0.5)
        x, position, tokens = embeddings(ours, ids, pixels), 0, []
        while len(tokens) < len(generated):
            last = run(ours, x, backend=backend, start=position)[-1]
            last[list(ours.eos_token_ids)] = float("-inf")
            position += x.shape[0]
            tokens.append(int(last.argmax()))
            x = ours.decoder.embed(torch.tensor(tokens[-1:]))
    assert tokens == generated


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_prompt_in_two_chunks_gives_the_logits_of_one(tmp_path, cut):
    ours = load_model(save(text_model("qwen3"), tmp_path), dtype="float32")
    config = ours.decoder.config
    x = embeddings(ours, token_ids(0))
    backend = DenseBackend(config.layers, config.head_dim**-0.5)
    parts = [run(ours, x[:cut], backend=backend), run(ours, x[cut:], backend=backend, start=cut)]
    torch.testing.assert_close(torch.cat(parts), run(ours, x), **TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3-moe"])
@pytest.mark.parametrize("rows", [[20], [3, 20], []], ids=["last", "two", "none"])
def test_rows_asked_of_the_last_layer_are_those_of_all(tmp_path, kind, rows):
    model = load_model(save(text_model(kind), tmp_path), dtype="float32")
    config, positions, wanted = model.decoder.config, torch.arange(21), torch.tensor(rows, dtype=torch.int64)
    x, rotary = model.decoder.embed(token_ids(5)), model.decoder.rotary(positions)
    last = config.layers - 1
    backends = [DenseBackend(config.layers, config.head_dim**-0.5, config.windows) for _ in range(2)]
    everything = model.decoder.layer(last, x, rotary, backends[0])
    some = model.decoder.layer(last, x, rotary, backends[1], wanted)
    torch.testing.assert_close(some, everything[wanted], atol=1e-6, rtol=1e-5)


def test_bfloat16_stays_near_float32(tmp_path):
    directory = save(text_model("llama"), tmp_path)
    exact, rounded = (load_model(directory, dtype=dtype) for dtype in ("float32", "bfloat16"))
    ids = token_ids(0)
    wanted, got = (run(model, embeddings(model, ids)).softmax(-1) for model in (exact, rounded))
    assert got.dtype == torch.float32
    assert (wanted - got).abs().sum(-1).max() < 0.2
