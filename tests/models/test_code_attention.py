"""VQToken's attention over codes beside a model: what it writes, what it refuses, and the method that needs it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismserve.cluster.commands.methods import listed
from prismserve.compression.loader import normalise, visual_method
from prismserve.core.errors import InvalidRequestError, ModelLoadError
from prismserve.core.types import CompressionPlan, MediaKind
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.engine.explaining import explain
from prismserve.models.code_attention import CodeAttention
from tests.models.matching import Case, Ours, clip
from tests.models.zoo import SPECIMENS

CPU = torch.device("cpu")
PATCHES, WIDTH, HEADS = 16, 48, 4
VIDEO = clip(4, 70, 40, (0, 9, 21, 30, 44))
SHORT = clip(6, 70, 40, (3, 40))
PUBLISHED = "model.cross_attention."
LAYER = {
    "self_attn.in_proj_weight": (3 * WIDTH, WIDTH),
    "self_attn.in_proj_bias": (3 * WIDTH,),
    "self_attn.out_proj.weight": (WIDTH, WIDTH),
    "self_attn.out_proj.bias": (WIDTH,),
    "multihead_attn.in_proj_weight": (3 * WIDTH, WIDTH),
    "multihead_attn.in_proj_bias": (3 * WIDTH,),
    "multihead_attn.out_proj.weight": (WIDTH, WIDTH),
    "multihead_attn.out_proj.bias": (WIDTH,),
    "linear1.weight": (2048, WIDTH),
    "linear1.bias": (2048,),
    "linear2.weight": (WIDTH, 2048),
    "linear2.bias": (WIDTH,),
    **{f"norm{number}.{part}": (WIDTH,) for number in (1, 2, 3) for part in ("weight", "bias")},
}
"""What the released checkpoint holds of each layer."""


def save_attention(directory, layers=1, prefix=PUBLISHED):
    """Small random weights under the names of the published checkpoint, among others of its own; without the prefix."""
    generator = torch.Generator().manual_seed(9)
    shapes = {"to_q_proj.weight": (WIDTH, PATCHES), "to_q_proj.bias": (WIDTH,)}
    shapes |= {f"transformer_decoder.layers.{i}.{name}": shape for i in range(layers) for name, shape in LAYER.items()}
    weights = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    directory.mkdir(exist_ok=True)
    stored = {prefix + name: tensor for name, tensor in weights.items()}
    save_file({**stored, "model.image_newline": torch.zeros(WIDTH)}, directory / "model.safetensors")
    settings = {"query_dim": PATCHES, "context_dim": WIDTH, "num_heads": HEADS, "num_layers": layers}
    (directory / "config.json").write_text(json.dumps({"model_type": "vqtoken", **settings}))
    return weights


def attention(weights, name, queries, keys):
    """Multi-head attention, head by head and row by row."""
    size = WIDTH // HEADS
    parts = weights[f"{name}.in_proj_weight"].split(WIDTH), weights[f"{name}.in_proj_bias"].split(WIDTH)
    q, k, v = (rows @ part.T + bias for rows, part, bias in zip((queries, keys, keys), *parts, strict=True))
    out = torch.zeros_like(q)
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        for row in range(len(q)):
            scores = torch.stack([q[row, own] @ key / math.sqrt(size) for key in k[:, own]])
            out[row, own] = (scores.exp() / scores.exp().sum()) @ v[:, own]
    return out @ weights[f"{name}.out_proj.weight"].T + weights[f"{name}.out_proj.bias"]


def norm(weights, name, x):
    centred = x - x.mean(1, keepdim=True)
    return (
        centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def slow_attention(weights, layers, places, codes):
    """The published forward pass: the map's rows repeated to the number of codes, a decoder that normalises behind."""
    repeated = places.repeat(len(codes), 1)[: len(codes)].float()
    x = repeated @ weights["to_q_proj.weight"].T + weights["to_q_proj.bias"]
    for index in range(layers):
        prefix = f"transformer_decoder.layers.{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        x = norm(own, "norm1", x + attention(own, "self_attn", x, x))
        x = norm(own, "norm2", x + attention(own, "multihead_attn", x, codes))
        inner = (x @ own["linear1.weight"].T + own["linear1.bias"]).clamp(min=0)
        x = norm(own, "norm3", x + inner @ own["linear2.weight"].T + own["linear2.bias"])
    return x


def slow_codes(frames, count, rounds=50):
    """K-means one patch at a time, codes numbered by their first member: the map and the codes."""
    unit = [row / row.norm() for row in frames.flatten(0, 1)]
    centres, owner = [unit[(2 * i + 1) * len(unit) // (2 * count)] for i in range(count)], None
    for _ in range(rounds):
        before, owner = owner, [max(range(count), key=lambda c: (float(row @ centres[c]), -c)) for row in unit]
        assert len(set(owner)) == count, "the case leaves a cluster empty"
        if owner == before:
            break
        means = [
            torch.stack([row for row, own in zip(unit, owner, strict=True) if own == c]).mean(0) for c in range(count)
        ]
        centres = [mean / mean.norm() for mean in means]
    order = list(dict.fromkeys(owner))
    codes = torch.stack(
        [torch.stack([u for u, own in zip(unit, owner, strict=True) if own == c]).mean(0) for c in order]
    )
    return torch.tensor([order.index(own) for own in owner]).view(len(frames), -1), codes


@pytest.mark.parametrize(("layers", "prefix"), [(1, PUBLISHED), (2, "")])
@pytest.mark.parametrize("frames", [1, 3, 7])
def test_it_writes_what_the_published_attention_does(frames, layers, prefix, tmp_path):
    weights = save_attention(tmp_path, layers, prefix)
    generator = torch.Generator().manual_seed(frames)
    places, codes = torch.randint(7, (frames, PATCHES), generator=generator), torch.randn(7, WIDTH, generator=generator)
    state = torch.random.get_rng_state()
    coded = CodeAttention(tmp_path, PATCHES, WIDTH, CPU)
    assert torch.equal(torch.random.get_rng_state(), state), "loading draws nothing"
    written = coded(places, codes)
    assert torch.allclose(written, slow_attention(weights, layers, places, codes), atol=1e-5)
    assert torch.equal(written, coded(places, codes))
    repeats = written[[row % frames for row in range(7)]]
    assert torch.allclose(written, repeats, atol=1e-5), "rows of the map that are taken twice"


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    save_attention(tmp_path)
    with pytest.raises(ModelLoadError, match="takes 16 patches a frame, the model's are 25"):
        CodeAttention(tmp_path, 25, WIDTH, CPU)
    with pytest.raises(ModelLoadError, match="takes 48 wide decoder inputs, the model's are 64"):
        CodeAttention(tmp_path, PATCHES, 64, CPU)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    for name in ("to_q_proj.bias", "transformer_decoder.layers.0.multihead_attn.in_proj_weight"):
        save_file({key: tensor for key, tensor in whole.items() if key != PUBLISHED + name}, file)
        with pytest.raises(ModelLoadError, match=f"lacks 1 of 20 weights: {name}"):
            CodeAttention(tmp_path, PATCHES, WIDTH, CPU)
    save_file({**whole, PUBLISHED + "to_q_proj.weight": torch.zeros(WIDTH, 7)}, file)
    with pytest.raises(ModelLoadError, match=r"to_q_proj\.weight has shape \[48, 7\]"):
        CodeAttention(tmp_path, PATCHES, WIDTH, CPU)
    settings = json.loads((tmp_path / "config.json").read_text())
    for changed, message in [
        ({"num_heads": 5}, "context_dim 48 is not divisible by num_heads 5"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ({"num_layers": None}, "num_layers must be a positive integer, got None"),
        ({"model_type": "qwen2"}, "no attention over codes of type 'vqtoken', but one of 'qwen2'"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**settings, **changed}))
        with pytest.raises(ModelLoadError, match=message):
            CodeAttention(tmp_path, PATCHES, WIDTH, CPU)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model that pools the frames of videos, without the attention."""
    path = tmp_path_factory.mktemp("plain")
    SPECIMENS["llava_onevision"].save(path, 0)
    return path


@pytest.fixture(scope="module")
def beside(plain, tmp_path_factory):
    """The same with it."""
    path = tmp_path_factory.mktemp("beside")
    for file in plain.iterdir():
        (path / file.name).symlink_to(file)
    save_attention(path / "vqtoken")
    return path


def plan(**params):
    spec = normalise(visual_method("vqtoken_attention"), params, "compression.visual")
    return CompressionPlan(visual=spec)


def engine_of(ours):
    return Engine(ours.model, ours.processor, EngineConfig(kv_cache_bytes=32 << 20, max_model_len=1024))


def answered(ours, compression, videos, question="What moves?"):
    """By number of the video: tokens, the error, and what the image cache holds of it, all asked at once."""
    engine, found = engine_of(ours), {}
    requests = {str(i): ours.request(str(i), Case(question, videos=(v,)), 4, compression) for i, v in enumerate(videos)}
    for request in requests.values():
        engine.submit(request, worker="local")
    while engine.has_work:
        for output in engine.step():
            tokens, _ = found.get(output.request_id, ([], None))
            found[output.request_id] = ([*tokens, *output.token_ids], output.error)
    keys = {name: next(request.prompt.media_segments()).key for name, request in requests.items()}
    return [(*found[name], engine.image_cache.get(keys[name])) for name in requests]


def test_the_decoder_reads_what_the_attention_makes_of_the_unpooled_frames(beside):
    ours, weights = (
        Ours(beside),
        {
            name.removeprefix(PUBLISHED): tensor
            for name, tensor in load_file(beside / "vqtoken" / "model.safetensors").items()
        },
    )
    ((tokens, error, held),) = answered(ours, plan(keep=8), [VIDEO])
    assert not error
    assert len(tokens) == 4
    inputs = ours.processor.preprocess_video(VIDEO.frames, VIDEO.times)
    with torch.inference_mode():
        vision = ours.model.vision
        hidden = vision.vision_tower(inputs.tensors["pixel_values_videos"][0], output_hidden_states=True).hidden_states
        frames = vision.multi_modal_projector(hidden[vision.config.vision_feature_layer])
        (encoded,) = ours.model.encode_images([inputs], frozenset())
    assert frames.shape == (5, PATCHES, WIDTH)
    expected = slow_attention(weights, 1, *slow_codes(frames, 8))
    layout = inputs.layout
    assert held.positions.tolist() == list(range(layout.tokens - 9, layout.tokens)), (
        "next to each other and to the text"
    )
    assert torch.allclose(held.embeds[:8], expected, atol=1e-4)
    assert torch.equal(held.embeds[8], encoded.tokens[-1]), "the closing token stays"
    ((_, _, again),) = answered(Ours(beside), plan(keep=8), [VIDEO], "Read the longer word in it.")
    assert torch.equal(held.embeds, again.embeds)


def test_an_explanation_draws_each_frame_as_merged_into_its_token(beside):
    ours = Ours(beside)
    request = ours.request("r", Case("What moves?", videos=(VIDEO,)), 1, plan(keep=8))
    (stage,) = explain(engine_of(ours), request).stages
    assert (stage.kept, stage.merged, stage.dropped) == (8, 12, 0)
    assert stage.fates[:12] == (12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14)


def test_watching_the_projector_changes_nothing_of_what_the_model_gives(beside):
    ours = Ours(beside)
    inputs = ours.processor.preprocess_video(VIDEO.frames, VIDEO.times)
    with torch.inference_mode():
        (one,) = ours.model.encode_images([inputs], frozenset())
        (other,) = ours.model.encode_images([inputs], frozenset({"unpooled_frames"}))
        (after,) = ours.model.encode_images([inputs], frozenset())
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.tokens, after.tokens)
    assert one.unpooled is None
    assert after.unpooled is None
    assert other.unpooled.shape == (5, PATCHES, WIDTH)


def test_more_frames_than_codes_are_refused_and_refuse_no_other(beside):
    ours = Ours(beside)
    ((_, error, _), (tokens, fine, _)) = answered(ours, plan(keep=3), [VIDEO, SHORT])
    assert "3 codes are fewer than the 5 frames" in error
    assert not fine
    assert tokens == answered(ours, plan(keep=3), [SHORT])[0][0]


def test_without_the_folder_the_method_is_refused_and_keys_are_others(plain, beside):
    without, within = Ours(plain), Ours(beside)
    assert within.processor.reducible_of(MediaKind.VIDEO) - without.processor.reducible_of(MediaKind.VIDEO) == {
        "vqtoken"
    }
    assert within.processor.reducible_of(MediaKind.IMAGE) is None
    assert without.processor.video_fingerprint != within.processor.video_fingerprint
    ((_, error, _),) = answered(without, plan(keep=8), [VIDEO])
    assert "'vqtoken_attention' cannot act on the video tokens of this model" in error


def test_other_weights_give_other_keys(beside, tmp_path):
    for file in beside.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    save_attention(tmp_path / "vqtoken")
    file = tmp_path / "vqtoken" / "model.safetensors"
    before = Ours(tmp_path).processor.video_fingerprint
    assert before == Ours(beside).processor.video_fingerprint
    stored = load_file(file)
    stored[PUBLISHED + "to_q_proj.bias"][0] += 1.0
    save_file(stored, file)
    assert before != Ours(tmp_path).processor.video_fingerprint


def test_the_baseline_is_not_the_trained_method_and_says_where_that_is():
    with pytest.raises(InvalidRequestError, match="the method vqtoken_attention"):
        normalise(visual_method("vqtoken"), {"trained": True}, "compression.visual")


def test_the_list_of_methods_says_whether_it_is_loaded(plain, beside):
    def weights(model):
        return {entry["name"]: entry["weights"] for entry in listed(model)}["vqtoken_attention"]

    held = [weights(model) for model in (None, str(plain), str(beside), "reference")]
    assert held == ["beside the model", "not loaded", "loaded", "not loaded"]
