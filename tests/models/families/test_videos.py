"""What must hold for every family that sees videos beside parity: counts, chunks, prefix hits, reduction, pixels."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from transformers.models.smolvlm.video_processing_smolvlm import get_resize_output_image_size

from prismserve.compression.loader import normalise, visual_method
from prismserve.core.errors import InvalidRequestError, ModelLoadError
from prismserve.core.types import CompressionPlan, FrameTimes, MediaSegment, Prompt, TextSegment
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.models.processing import ChatMessage, Processor, VideoSlot
from tests.models.matching import VIDEO_CASES, Case, Ours, clip, picture
from tests.models.zoo import SPECIMENS, WATCHING

TOKENS = 8


@pytest.fixture(scope="module", params=WATCHING)
def ours(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    SPECIMENS[request.param].save(path, 0)
    return Ours(path)


def plan(**params):
    return CompressionPlan(visual=normalise(visual_method("uniform"), params, "visual"))


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("size", [(70, 40), (33, 90)])
def test_size_and_times_alone_tell_how_many_tokens_the_encoder_gives(ours, size, frames):
    video = clip(1, *size, tuple(range(frames)))
    inputs = ours.processor.preprocess_video(video.frames, video.times)
    (encoded,) = ours.model.encode_images([inputs], frozenset())
    layout = inputs.layout
    assert encoded.tokens.shape[0] == layout.tokens
    assert layout.frames * layout.grid[0] * layout.grid[1] == layout.raster_tokens
    assert layout.positions is None or layout.positions.shape == (3, layout.tokens)


def test_tokens_do_not_depend_on_chunks_or_the_prefix_cache(ours):
    requests = [ours.request(name, case, TOKENS) for name, case in VIDEO_CASES.items()]
    expected = ours.run(requests, max_step_tokens=512)
    assert ours.run(requests, max_step_tokens=7, block_tokens=5) == expected
    engine = Engine(ours.model, ours.processor, EngineConfig(kv_cache_bytes=32 << 20, max_model_len=1024))
    for request in [*requests, *requests]:
        engine.submit(request, worker="local")
        tokens = []
        while engine.has_work:
            tokens += [token for output in engine.step() for token in output.token_ids]
        assert tokens == expected[request.request_id]
    assert engine.stats().prefix_hit_tokens > 0


def test_a_reduced_video_keeps_positions_and_what_stands_around_its_frames(ours):
    case = Case("What moves?", videos=(clip(4, 70, 40, (0, 9, 21, 30)),))
    request = ours.request("reduced", case, TOKENS, plan(keep=3))
    (segment,) = request.prompt.media_segments()
    video = case.videos[0]
    layout = ours.processor.video_layout(70, 40, video.times)
    engine = Engine(ours.model, ours.processor, EngineConfig(kv_cache_bytes=32 << 20, max_model_len=1024))
    engine.submit(request, worker="local")
    while engine.has_work:
        assert not any(output.error for output in engine.step())
    raster = torch.arange(layout.tokens) if layout.raster is None else layout.raster
    around = [slot for slot in range(layout.tokens) if slot not in set(raster.tolist())]
    chosen = raster[(2 * torch.arange(3) + 1) * layout.raster_tokens // 6]
    slots = torch.tensor(sorted([*around, *chosen.tolist()]))
    held = engine.image_cache.get(segment.key)
    assert segment.tokens == len(slots) == layout.kept(3)
    assert torch.equal(held.positions, slots if layout.positions is None else layout.positions[:, slots])
    (encoded,) = ours.model.encode_images([ours.processor.preprocess_video(video.frames, video.times)], frozenset())
    width = encoded.tokens.shape[1]
    assert torch.equal(held.embeds[:, :width], encoded.tokens[slots])


def test_keeping_every_token_changes_nothing(ours):
    case = VIDEO_CASES["one video"]
    all_kept = ours.request("all", case, TOKENS, plan(keep=1.0))
    assert ours.run([all_kept])["all"] == ours.run([ours.request("off", case, TOKENS)])["off"]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_frame_shown_twice_is_the_picture_of_the_image_processor(tmp_path, family):
    SPECIMENS[family].save(tmp_path, 0)
    processor = Ours(tmp_path).processor
    image = picture(1, 70, 40)
    frames = np.stack([np.asarray(image)] * 2)
    video = processor.preprocess_video(frames, FrameTimes((0.0, 0.5), 2.0)).tensors
    still = processor.preprocess(image).tensors
    torch.testing.assert_close(video["pixel_values_videos"], still["pixel_values"], rtol=0, atol=1e-5)
    assert torch.equal(video["video_grid_thw"], still["image_grid_thw"])


def test_the_answer_begins_behind_the_highest_position_of_a_slow_video():
    segment = MediaSegment(0, b"k" * 32, 8, 8, position_span=2, position_reach=50)
    assert Prompt((TextSegment((1, 2)), segment, TextSegment((3,)))).next_position == 52
    assert Prompt((segment, TextSegment(tuple(range(60))))).next_position == 62


@pytest.fixture
def smolvlm(tmp_path):
    SPECIMENS["smolvlm"].save(tmp_path, 0)
    return tmp_path


def test_smolvlm_scales_frames_to_the_sizes_of_transformers(smolvlm):
    recipe = Ours(smolvlm).processor._video_recipe
    for height, width in itertools.product((1, 2, 7, 33, 360, 481), (1, 5, 64, 90, 641)):
        expected = get_resize_output_image_size(torch.empty(3, height, width), 64)
        assert recipe.first_size(height, width) == tuple(expected)


def test_smolvlm_writes_a_placeholder_that_is_no_token_and_users_cannot(smolvlm):
    tokenizer = json.loads((smolvlm / "tokenizer.json").read_text())
    # As in the hub's vocabulary, which has no such token.
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace("<video>", "<reserved>")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<reserved>"] = vocabulary.pop("<video>")
    (smolvlm / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((smolvlm / "tokenizer_config.json").read_text())
    config.pop("extra_special_tokens", None)
    (smolvlm / "tokenizer_config.json").write_text(json.dumps(config).replace("<video>", "<reserved>"))
    processor = Processor.from_directory(smolvlm)
    assert "<video>" not in processor.tokenizer.get_vocab()
    times = FrameTimes((0.0, 61.5), 2 / 75)
    ids = processor.render_chat([ChatMessage("user", (VideoSlot(0), "a <video> <image> b"))], {0: times})
    slot = ids.index(VideoSlot(0))
    before, after = (processor.decode(part, skip_special_tokens=False) for part in (ids[:slot], ids[slot + 1 :]))
    assert before == (
        "<|im_start|>User: You are provided the following series of two frames from a 0:01:15 [H:MM:SS] video.\n\n"
        "Frame from 00:00:<fake_token_around_image><global-img>"
    )
    assert after.startswith("<fake_token_around_image>\n\na <video> <image> b<end_of_utterance>")
    assert processor.image_token_id not in ids
    between = processor.decode(processor.video_layout(70, 40, times).ids, skip_special_tokens=False)
    head = "<fake_token_around_image>\nFrame from 01:01:<fake_token_around_image><global-img>"
    assert between == "<image>" * 4 + head + "<image>" * 4


def test_smolvlm_refuses_frames_of_another_size_than_its_tower_takes(smolvlm):
    path = smolvlm / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_image_size": {"longest_edge": 48}}))
    with pytest.raises(ModelLoadError, match="frames of 48 pixels, the vision tower takes 32"):
        Processor.from_directory(smolvlm)


def test_idefics3_takes_no_videos(tmp_path):
    SPECIMENS["idefics3"].save(tmp_path, 0)
    processor = Processor.from_directory(tmp_path)
    assert not processor.supports_videos
    with pytest.raises(InvalidRequestError, match="takes no videos"):
        processor.render_chat([ChatMessage("user", (VideoSlot(0), "?"))], {0: FrameTimes((0.0,), 1.0)})
