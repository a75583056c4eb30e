"""What must hold for every family that sees videos beside parity: counts, chunks, prefix hits, reduction, pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prismserve.compression.loader import normalise, visual_method
from prismserve.core.types import CompressionPlan, FrameTimes, MediaSegment, Prompt, TextSegment
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
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
