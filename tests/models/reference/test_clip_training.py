"""The clip model is an ordinary checkpoint, and training on clips computes what transformers computes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prismserve.core.errors import ConfigurationError, ModelLoadError
from prismserve.core.types import FrameTimes
from prismserve.models.loader import load_model
from prismserve.models.processing import ChatMessage, Processor, VideoSlot
from prismserve.models.reference import train_clips
from prismserve.models.reference.build import USER
from prismserve.models.reference.clip_data import Asker
from prismserve.models.reference.clip_model import TRAINED_FILE, VIDEO, load, write_checkpoint
from prismserve.models.reference.clip_stage import STATE_FILE, ClipOptions, Trainer, forward, watch
from prismserve.models.reference.clips import FRAMES, TOKENS, Clip
from prismserve.models.reference.forward import normalise

TINY = ClipOptions(steps=2, batch=2, fresh=1, warmup_steps=1, report_steps=1, save_steps=1, validation_clips=2)
TIMES = FrameTimes((0.0, 0.5, 1.0, 1.5), 2.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("clips"))


def test_a_served_clip_has_the_tokens_training_saw(checkpoint):
    frames = Clip(0).frames
    served = load_model(checkpoint, dtype="float32", device="cpu", progress=None)
    inputs = Processor.from_directory(checkpoint).preprocess_video(frames, TIMES)
    (encoded,) = served.encode_images([inputs], frozenset())
    model, _ = load(checkpoint)
    trained = watch(model, Clip(0)).tokens.float()
    with torch.no_grad():
        pixels = normalise(torch.from_numpy(frames)).permute(0, 3, 1, 2)[None]
        theirs = model.model.get_video_features(pixel_values_videos=pixels, return_dict=True).pooler_output[0]
    assert inputs.layout.frames == FRAMES
    assert encoded.tokens.shape == trained.shape == (TOKENS + 1, 256)
    assert torch.allclose(encoded.tokens, theirs, atol=1e-4)
    assert float((trained - theirs).abs().mean() / theirs.abs().mean()) < 0.03


def test_a_video_stands_where_training_put_it(checkpoint):
    processor = Processor.from_directory(checkpoint)
    rendered = processor.render_chat([ChatMessage("user", (VideoSlot(0), "Is there a ring?"))], {0: TIMES})
    assert [isinstance(item, VideoSlot) for item in rendered[:3]] == [False, True, False]
    assert processor.video_layout(224, 224, TIMES).tokens == TOKENS + 1
    assert VIDEO in processor.placeholder_ids


def test_a_tower_that_keeps_its_class_token_is_refused(tmp_path):
    config = write_checkpoint(tmp_path) / "config.json"
    config.write_text(config.read_text().replace('"default"', '"full"'))
    with pytest.raises(ModelLoadError, match="class token"):
        Processor.from_directory(tmp_path)


def test_training_computes_what_transformers_does_with_some_tokens_left_out(checkpoint):
    model, tokenizer = load(checkpoint)
    clips = [watch(model, Clip(0)), watch(model, Clip(1))]
    batch = Asker(tokenizer).ask_about(clips, 50, np.random.default_rng(0), single=True)
    with torch.no_grad():
        got = forward(model, batch)[1].float()
        lm = model.model.language_model
        first = batch.segments[0] == 1
        x = torch.cat([lm.embed_tokens.weight[[USER]], batch.tokens[0].float(), lm.embed_tokens(batch.ids[0, first])])
        places = torch.cat([torch.tensor([0]), batch.places[0] + 1, torch.tensor([TOKENS + 1])])
        positions = torch.cat([places, TOKENS + 2 + torch.arange(int(first.sum()))])
        want = lm(inputs_embeds=x[None], position_ids=positions[None]).last_hidden_state[0, -1]
    ours = got[0, 50 + 2 :][first][-1]
    assert float((ours - want).abs().mean() / want.abs().mean()) < 0.05


@pytest.mark.slow
def test_training_changes_the_decoder_and_nothing_of_the_tower_and_goes_on_where_it_stopped(tmp_path):
    model, tokenizer = load(write_checkpoint(tmp_path))
    first = Trainer(model, tokenizer, tmp_path, dataclasses.replace(TINY, steps=1)).train()
    assert (first.step, len(first.losses)) == (1, 1)
    assert (tmp_path / STATE_FILE).is_file()
    fresh, _ = load(write_checkpoint(tmp_path / "fresh"))
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    second = Trainer(fresh, tokenizer, tmp_path, TINY).train()
    assert second.step == 2
    assert second.losses[0] == first.losses[0]
    changed = {name for name, value in fresh.state_dict().items() if not torch.equal(before[name], value)}
    assert changed
    assert all("language_model" in name or name == "lm_head.weight" for name in changed)
    assert changed - {"lm_head.weight"} == load_file(tmp_path / TRAINED_FILE).keys()
    with pytest.raises(ConfigurationError, match="1 new clips a step"):
        Trainer(fresh, tokenizer, tmp_path, dataclasses.replace(TINY, fresh=2))


@pytest.mark.slow
def test_the_command_leaves_a_checkpoint_that_serves(tmp_path):
    assert train_clips.main(["--out", str(tmp_path), "--smoke"]) == 0
    served = load_model(tmp_path, dtype="float32", device="cpu", progress=None)
    trained = load_file(tmp_path / TRAINED_FILE)
    weight = served.decoder.embed(torch.tensor([9]))[0]
    assert torch.equal(weight, trained["model.language_model.embed_tokens.weight"][9].float())
    assert np.isfinite(weight.numpy()).all()


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "0"], ["--minutes", "0"], ["--lr", "-1"], ["--fresh", "99"], ["--drilled", "2"], ["--choice", "0"]],
)
def test_arguments_that_make_no_sense_are_refused(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_clips.main(["--out", str(tmp_path), *arguments])
    assert "error" in capsys.readouterr().err
