"""What must hold for every family beside parity: chunks, prefix hits, narrow dtypes, compression, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from prismserve.compression.loader import normalise, visual_method
from prismserve.core.errors import InvalidRequestError, ModelLoadError
from prismserve.core.types import CompressionPlan, FinishReason, MediaSegment
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.models.loader import inspect_checkpoint, load_model
from prismserve.models.processing import ChatMessage, ImageSlot, Processor
from tests.models.matching import CASES, Case, Ours, picture
from tests.models.zoo import SEEING, SPECIMENS

TOKENS = 10
SIZES = [(32, 32), (70, 40), (40, 90), (33, 33), (120, 31), (64, 64), (17, 60)]
# First-token distributions in bfloat16 against float32, total variation.
BF16_TOLERANCE = 0.1


@pytest.fixture(scope="module", params=SEEING)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def directory(family, tmp_path_factory):
    path = tmp_path_factory.mktemp(family)
    SPECIMENS[family].save(path, 0)
    return path


@pytest.fixture(scope="module")
def ours(directory):
    return Ours(directory)


def requests_of(ours, visual=None):
    extra = {} if visual is None else {"visual": visual}
    return [ours.request(name, case, TOKENS, **extra) for name, case in CASES.items()]


def plan(method, **params):
    return CompressionPlan(visual=normalise(visual_method(method), params, "visual"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("images", [1, 2])
def test_a_size_alone_tells_how_many_tokens_the_encoder_gives(ours, size, images):
    layout = ours.processor.image_layout(*size, images=images)
    inputs = ours.processor.preprocess(picture(0, *size), images=images)
    (encoded,) = ours.model.encode_images([inputs], frozenset())
    assert encoded.tokens.shape[0] == layout.tokens == inputs.layout.tokens
    assert layout.grid[0] * layout.grid[1] == layout.tokens
    assert layout.positions is None or layout.positions.shape == (3, layout.tokens)


def test_tokens_do_not_depend_on_chunks_blocks_or_the_prefix_cache(ours):
    requests = requests_of(ours)
    expected = ours.run(requests, max_step_tokens=512)
    assert ours.run(requests, max_step_tokens=7, block_tokens=5) == expected
    engine = Engine(ours.model, ours.processor, EngineConfig(kv_cache_bytes=32 << 20, max_model_len=1024))
    for attempt in range(2):
        for request in requests:
            engine.submit(request, worker="local")
            tokens = []
            while engine.has_work:
                tokens += [token for output in engine.step() for token in output.token_ids]
            assert tokens == expected[request.request_id], f"pass {attempt}"
    assert engine.stats().prefix_hit_tokens > 0


def test_an_image_is_encoded_alike_alone_and_in_a_batch(ours):
    inputs = [ours.processor.preprocess(picture(seed, 70, 40), images=3) for seed in range(3)]
    together = ours.model.encode_images(inputs, frozenset())
    for one, among in zip(inputs, together, strict=True):
        (alone,) = ours.model.encode_images([one], frozenset())
        assert torch.equal(alone.tokens, among.tokens)


def test_bfloat16_starts_with_nearly_the_distribution_of_float32(ours, directory):
    rounded = Ours(directory, dtype="bfloat16")
    for name, case in CASES.items():
        first = {}
        for side in (ours, rounded):
            side.logits.clear()
            side.run([side.request(name, case, 1)])
            first[side.dtype] = side.logits[name][0].softmax(-1)
        assert (first["float32"] - first["bfloat16"]).abs().sum() / 2 < BF16_TOLERANCE, name


def test_a_family_either_reduces_tokens_or_refuses(ours):
    case = CASES["one image"]
    request = ours.request("reduced", case, TOKENS, plan("uniform", keep=3))
    if ours.processor.reducible is not None:
        assert next(request.prompt.media_segments()).tokens == 3
        assert len(ours.run([request])["reduced"]) == TOKENS
        all_kept = ours.request("all", case, TOKENS, plan("uniform", keep=1.0))
        assert ours.run([all_kept])["all"] == ours.run([ours.request("off", case, TOKENS)])["off"]
        return
    engine = Engine(ours.model, ours.processor, EngineConfig(kv_cache_bytes=32 << 20, max_model_len=1024))
    engine.submit(request, worker="local")
    (output,) = engine.step()
    assert output.finish_reason is FinishReason.ERROR
    assert "cannot act on the image tokens of this model" in output.error


def test_a_method_that_looks_into_the_encoder_needs_one_that_lets_it(ours, family):
    needs = frozenset(str(need) for need in visual_method("visionzip").needs)
    reducible = ours.processor.reducible
    assert (reducible is not None and needs <= reducible) == (family == "llava")


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_survivors_keep_the_positions_they_had(tmp_path, family):
    SPECIMENS[family].save(tmp_path, 0)
    ours = Ours(tmp_path)
    request = ours.request("reduced", CASES["one image"], 1, plan("uniform", keep=3))
    engine = Engine(ours.model, ours.processor, EngineConfig(kv_cache_bytes=32 << 20, max_model_len=1024))
    engine.submit(request, worker="local")
    engine.step()
    segment = next(s for s in request.prompt.segments if isinstance(s, MediaSegment))
    layout = ours.processor.image_layout(70, 40)
    raster = (2 * torch.arange(3) + 1) * layout.tokens // 6
    expected = raster if layout.positions is None else layout.positions[:, raster]
    assert torch.equal(engine.image_cache.get(segment.key).positions, expected)


def test_an_image_among_others_has_another_key_only_where_it_is_read_differently(ours, family):
    alone, among = ours.processor.image_fingerprint(1), ours.processor.image_fingerprint(2)
    assert (alone != among) == (family == "llava_onevision")
    assert ours.processor.image_fingerprint(3) == among


def test_placeholders_typed_by_a_user_are_text(ours, family):
    typed = SPECIMENS[family].placeholder
    ids = ours.processor.render_chat([ChatMessage("user", (ImageSlot(0), f"a {typed} b"))])
    assert sum(isinstance(item, ImageSlot) for item in ids) == 1
    assert ours.processor.image_token_id not in ids


def test_it_is_described_without_loading_it(directory, family):
    info = inspect_checkpoint(directory)
    assert info.supports_images
    assert info.position_scheme == ("mrope" if family.startswith("qwen") else "rope")
    assert info.image_tokens > 0


@pytest.mark.parametrize("size", [(0, 5), (5, -1)])
def test_an_image_without_content_is_refused(ours, size):
    with pytest.raises(InvalidRequestError, match="has no content"):
        ours.processor.image_layout(*size)


REFUSED = {
    "llava_next": ({"vision_feature_select_strategy": "full"}, "class token in every tile"),
    "llava_onevision": ({"vision_aspect_ratio": "square"}, "vision_aspect_ratio 'square' is not supported"),
    "idefics3": ({"scale_factor": 9}, "folds 9 x 9 patches"),
    "internvl": ({"downsample_ratio": 0.01}, "tiles of 0 x 0 tokens"),
    "qwen3_vl": ({"vision_config.deepstack_visual_indexes": [0, 1, 2, 0]}, "after 4 layers of a decoder of 3"),
    "qwen2_vl": ({"text_config.rope_parameters.mrope_section": [9, 9, 9]}, "does not divide 6 channel pairs"),
    "mistral3": ({"spatial_merge_size": 9}, "merges 9 x 9 patches"),
    "gemma3": ({"mm_tokens_per_image": 5}, "asks for 5 tokens an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_family_cannot_do_is_refused_in_one_sentence(tmp_path, name):
    changes, reason = REFUSED[name]
    SPECIMENS[name].save(tmp_path, 0)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for where, value in changes.items():
        *parents, last = where.split(".")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    path.write_text(json.dumps(config))
    for act in (inspect_checkpoint, load_model, Processor.from_directory):
        with pytest.raises(ModelLoadError, match=reason) as error:
            act(tmp_path)
        assert "\n" not in str(error.value)


def test_gemma_refuses_a_processor_that_adds_crops_to_the_prompt(tmp_path):
    SPECIMENS["gemma3"].save(tmp_path, 0)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_pan_and_scan": True}))
    with pytest.raises(ModelLoadError, match="do_pan_and_scan"):
        Processor.from_directory(tmp_path).image_layout(70, 40)


def test_an_image_longer_than_the_step_is_computed_in_one_piece_where_it_is_read_both_ways(tmp_path):
    SPECIMENS["gemma3"].save(tmp_path, 0)
    ours = Ours(tmp_path)
    case = Case("Which?", (picture(1, 70, 40), picture(2, 40, 70)))
    request = ours.request("r", case, TOKENS)
    whole = ours.run([request], max_step_tokens=512)
    for step_tokens in (2, 3, 5):
        assert ours.run([request], max_step_tokens=step_tokens) == whole


@pytest.mark.parametrize("kv", ["bf16", "fp8", "int8", "int4"])
def test_windows_and_images_over_a_narrow_pool_do_not_depend_on_chunks(kv, tmp_path):
    SPECIMENS["gemma3"].save(tmp_path, 0)
    gemma = Ours(tmp_path)
    whole = gemma.run(requests_of(gemma), kv_cache_dtype=kv)
    assert gemma.run(requests_of(gemma), kv_cache_dtype=kv, max_step_tokens=7) == whole
    first = next(iter(whole))
    assert len(whole[first]) == TOKENS
    exact = torch.stack(gemma.logits[first])
    Ours.run(gemma, requests_of(gemma))
    assert not torch.equal(torch.stack(gemma.logits[first][-TOKENS:]), exact[:TOKENS]), "the pool's rounding shows"
