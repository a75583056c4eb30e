"""Every stage for a step or two, and the proof that the training code computes what the published weights learned."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
import torch

from prismserve.core.errors import ConfigurationError
from prismserve.models.reference import reference_path, train
from prismserve.models.reference.ablation import ablation, conditions, farthest_first
from prismserve.models.reference.build import ASSISTANT, END, PAD, SPECIAL_TOKENS, build_model, build_tokenizer
from prismserve.models.reference.data import (
    IGNORE,
    TEXT_TOKENS,
    Scenes,
    attention_inputs,
    thin_background,
)
from prismserve.models.reference.evaluate import FamilyScore, generate_accuracy, held_out_questions, table
from prismserve.models.reference.forward import HIDDEN, PREFIX_TOKENS, check_forward
from prismserve.models.reference.heads import Heads, attention_auc, foreground
from prismserve.models.reference.optimizer import Optimizers
from prismserve.models.reference.scenes import HELD_OUT_SEED, Scene
from prismserve.models.reference.stages import JointOptions, VisionOptions, train_joint, train_vision
from prismserve.models.reference.vocabulary import FAMILIES, IMAGE_TOKENS

TINY = JointOptions(steps=1, batch=2, warmup_steps=1, validation_scenes=2, compiled=False, workers=0)


@pytest.fixture(scope="module")
def published():
    """The bundled model in float32 with its processor."""
    model, processor, _ = train.reload(reference_path())
    return model, processor


@pytest.fixture(scope="module")
def tokenizer(published):
    return published[1].tokenizer


def first_batch(tokenizer, count=4, stop=None):
    return next(iter(Scenes(tokenizer, HELD_OUT_SEED, count, stop)))


def test_the_written_out_forward_equals_transformers_on_random_and_on_published_weights(published):
    assert check_forward(build_model()) < 0.03
    assert check_forward(published[0]) < 0.03


def test_a_forward_that_differs_is_refused(monkeypatch):
    model = build_model()
    monkeypatch.setattr("prismserve.models.reference.forward.project", lambda _, x: x.new_zeros(*x.shape[:2], 256))
    with pytest.raises(ConfigurationError, match="differs from transformers"):
        check_forward(model)


def test_one_vision_step_gives_heads_and_moves_the_tower():
    model = build_model()
    before = model.model.vision_tower.embeddings.patch_embedding.weight.clone()
    heads = train_vision(model, VisionOptions(steps=1, batch=2, warmup_steps=1, compiled=False, workers=0))
    assert isinstance(heads, Heads)
    assert not torch.equal(before, model.model.vision_tower.embeddings.patch_embedding.weight)


def test_the_published_weights_have_learned_what_the_joint_stage_teaches(tmp_path):
    model, processor, heads = train.reload(reference_path())
    options = dataclasses.replace(TINY, first_seed=HELD_OUT_SEED, background_drop=0.7, rate=1e-6)
    (loss,) = train_joint(model, heads, processor, tmp_path, options)
    assert loss < 0.3  # an untrained model starts above 6
    assert {path.name for path in reference_path().iterdir()} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_joint_stage_ends_early_when_its_time_is_up(tmp_path):
    model, processor, heads = train.reload(reference_path())
    options = dataclasses.replace(TINY, steps=50, minutes=1e-9)
    assert len(train_joint(model, heads, processor, tmp_path, options)) == 1


def test_the_warm_up_is_handed_over_bit_for_bit(tmp_path):
    model = build_model()
    heads = train.warm_up(model, tmp_path, VisionOptions(steps=1, batch=2, warmup_steps=1, compiled=False, workers=0))
    other = build_model()
    restored = train.restore_warm_up(other, tmp_path)
    for a, b in ((model.model.vision_tower, other.model.vision_tower), (heads, restored)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_what_is_not_there_is_one_sentence_and_a_failing_exit(tmp_path, capsys):
    assert (
        train.main(["--out", str(tmp_path), "--stage", "joint", "--init", str(tmp_path / "x"), "--threads", "1"]) == 1
    )
    assert "holds no saved model" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="vision-warmup"):
        train.restore_warm_up(build_model(), tmp_path)
    with pytest.raises(ConfigurationError, match="holds no saved model"):
        generate_accuracy(tmp_path)


@pytest.mark.parametrize("flags", [["--joint-steps", "0"], ["--lr", "nan"], ["--background-drop", "1.5"]])
def test_flags_out_of_range_are_refused(flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), *flags])
    assert flags[0] in capsys.readouterr().err


def test_packed_rows_hold_whole_conversations_that_see_only_themselves(tokenizer):
    batch = first_batch(tokenizer)
    mask, positions = attention_inputs(batch)
    assert batch.ids.shape == (4, TEXT_TOKENS)
    for row in range(4):
        segments = batch.segments[row]
        for family, start, slots in batch.spans[row]:
            answer = batch.targets[row, start : start + slots]
            assert family in FAMILIES
            assert answer[-1] == END
            assert (answer != IGNORE).all()
            assert batch.ids[row, start] == ASSISTANT
        seen = mask[row, 0, PREFIX_TOKENS:, PREFIX_TOKENS:] == 0
        same = segments[:, None] == segments[None, :]
        assert torch.equal(seen, same & torch.ones_like(same).tril())
        assert (mask[row, 0, PREFIX_TOKENS:, :PREFIX_TOKENS] == 0).all()
        starts = torch.tensor([i == 0 or segments[i] != segments[i - 1] for i in range(TEXT_TOKENS)])
        assert (positions[row, PREFIX_TOKENS:][starts & (segments > 0)] == PREFIX_TOKENS).all()
        assert (batch.ids[row][segments < 0] == PAD).all()


def test_evaluation_rows_have_no_follow_up_turns(tokenizer):
    batch = first_batch(tokenizer, stop=HELD_OUT_SEED + 4)
    for row, spans in enumerate(batch.spans):
        assert len(spans) == batch.segments[row].max()


def test_thinning_hides_background_and_never_foreground(tokenizer):
    batch = first_batch(tokenizer)
    mask, _ = attention_inputs(batch)
    thin_background(batch.labels, mask, 1.0, torch.Generator().manual_seed(1))
    hidden = mask[:, 0, -1, 1:PREFIX_TOKENS] < HIDDEN / 2
    assert hidden.any()
    assert not (hidden & foreground(batch.labels)).any()


def test_the_rate_warms_up_and_anneals():
    module = torch.nn.Linear(4, 4)
    optimizer = Optimizers((module, 1.0))
    rates = []
    for step in range(10):
        optimizer.set_rate(step, step / 9, warmup_steps=2)
        rates.append(optimizer._groups[-1]["lr"])
    assert rates[0] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.02)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_auc_is_one_for_a_perfect_ranking_and_zero_for_its_reverse():
    score = torch.arange(10.0)[None]
    front = torch.tensor([[False] * 6 + [True] * 4])
    assert attention_auc(score, front).item() == 1.0
    assert attention_auc(-score, front).item() == 0.0


def test_farthest_first_takes_the_outlier_before_the_copies():
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [1.0, 0.02]]])
    assert farthest_first(tokens, 2)[0].argmax() == 2


def test_the_tokenizer_splits_digits_and_reserves_the_special_tokens():
    small = build_tokenizer(corpus_scenes=5)
    assert small.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert len(small.encode("9251", add_special_tokens=False)) == 4
    assert len(small) <= 768


def test_held_out_questions_are_as_many_as_asked_and_never_trained_on():
    asked = held_out_questions(3)
    assert {len(items) for items in asked.values()} == {3}
    assert np.array_equal(asked["count"][0].image, Scene(HELD_OUT_SEED).image)


def test_the_published_weights_answer_held_out_questions():
    scores = generate_accuracy(reference_path(), per_family=3, batch=3)
    assert sum(s.right for s in scores.values()) >= 27
    assert table(scores).splitlines()[-1].startswith("| **all** |")


def test_the_table_adds_up():
    scores = {"color": FamilyScore(1, 2, ()), "word": FamilyScore(2, 2, ())}
    assert table(scores).splitlines()[2:] == [
        "| color | 1 / 2 | 50.0% |",
        "| word | 2 / 2 | 100.0% |",
        "| **all** | 3 / 4 | 75.0% |",
    ]


@pytest.mark.slow
def test_ablation_reports_every_condition_and_blindness_costs_answers():
    result = ablation(reference_path(), scenes=2, batch=2, compiled=False, workers=0)
    assert set(result) == {c.name for c in conditions()}
    mean = {name: sum(scores.values()) / len(scores) for name, scores in result.items()}
    assert mean["all tokens"] > 0.9
    assert mean["projector output zeroed"] < 0.5
    assert collections.Counter(c.kind for c in conditions())["random"] == 10
    assert IMAGE_TOKENS == 196


@pytest.mark.slow
def test_the_smoke_run_passes_through_every_stage(tmp_path):
    assert train.main(["--out", str(tmp_path), "--smoke", "--threads", "2"]) == 0
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / train.WARMUP_FILE).is_file()
