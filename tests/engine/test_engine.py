from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prismserve.compression.loader import normalise, visual_method
from prismserve.core.errors import (
    ConfigurationError,
    ContextLengthError,
    InvalidRequestError,
    OverloadedError,
)
from prismserve.core.types import CompressionPlan, FinishReason, MediaSegment, Prompt, TextSegment

LONG = {"max_tokens": 24, "min_tokens": 24}


def mixed_batch(workshop):
    """Text alone, one image, several images, shared images; short and long answers."""
    wanted = [((0,), 0), ((0,), 1), ((1,), 0), ((), 0), ((0, 1), 0), ((2,), 0), ((2,), 1), ((1, 1), 0)]
    requests = []
    for number, (scenes, question) in enumerate(wanted):
        text = workshop.questions(scenes[0])[question] if scenes else "What is the color of the sky?"
        sampling = LONG if number % 2 else {}
        requests.append(workshop.request(f"r{number}", text, scenes, **sampling))
    return requests


@pytest.fixture(scope="module")
def batch(workshop, peer):
    requests = mixed_batch(workshop)
    return requests, {request.request_id: peer(request) for request in requests}


@pytest.mark.parametrize("step_tokens", [32, 100, 2048])
def test_greedy_tokens_equal_transformers_at_any_chunk_size(workshop, batch, step_tokens) -> None:
    requests, expected = batch
    engine = workshop.engine(max_step_tokens=step_tokens)
    assert workshop.answers(engine, requests) == expected
    assert engine.pool.used_groups == 0
    assert workshop.answers(engine, requests) == expected, "from the prefix cache"


@pytest.mark.parametrize("block_tokens", [1, 7, 64])
def test_greedy_tokens_do_not_depend_on_the_block_size(workshop, batch, block_tokens) -> None:
    requests, expected = batch
    engine = workshop.engine(block_tokens=block_tokens, max_step_tokens=150)
    assert workshop.answers(engine, requests[:5]) == {name: expected[name] for name in list(expected)[:5]}


def test_greedy_tokens_equal_without_prefix_caching_and_one_by_one(workshop, batch) -> None:
    requests, expected = batch
    engine = workshop.engine(prefix_caching=False)
    for request in requests[:6]:
        assert workshop.answers(engine, [request])[request.request_id] == expected[request.request_id]
    stats = engine.stats()
    assert (stats.prefix_hit_tokens, stats.kv_blocks_cached) == (0, 0)


def test_greedy_tokens_equal_when_sequences_are_preempted_and_recomputed(workshop, peer) -> None:
    requests = [
        workshop.request(f"p{n}", f"What shape is {'very ' * n}big?", (n % 2,), max_tokens=40, min_tokens=40)
        for n in range(4)
    ]
    expected = {request.request_id: peer(request) for request in requests}
    engine = workshop.engine(blocks=32, max_model_len=32 * 16, max_step_tokens=300)
    assert workshop.answers(engine, requests) == expected
    assert engine.stats().preemptions > 0


def test_a_repeated_image_is_encoded_once_and_its_prefix_computed_once(workshop) -> None:
    engine = workshop.engine()
    first, second = workshop.questions(0)[:2]
    workshop.answers(engine, [workshop.request("a", first, (0,))])
    engine.submit(workshop.request("b", second, (0,)), worker="local")
    report = workshop.drive(engine)["b"][0].report
    assert (report.images, report.images_cached) == (1, 1)
    assert report.cached_tokens >= 196
    assert report.cached_tokens + report.computed_tokens == workshop.request("b", second, (0,)).prompt.tokens
    assert engine.stats().encoded_images == 1


def test_concurrent_questions_about_one_image_compute_it_once(workshop) -> None:
    engine = workshop.engine()
    requests = [workshop.request(f"q{n}", text, (3,)) for n, text in enumerate(workshop.questions(3)[:4])]
    workshop.answers(engine, requests)
    stats = engine.stats()
    assert stats.encoded_images == 1
    assert stats.prefill_tokens < requests[0].prompt.tokens + 4 * 40
    assert stats.prefix_hit_tokens >= 3 * 192


def test_an_image_dropped_from_its_cache_is_not_needed_when_the_prefix_is_cached(workshop) -> None:
    engine = workshop.engine(image_cache_bytes=0)
    first, second = workshop.questions(0)[:2]
    expected = workshop.answers(workshop.engine(), [workshop.request("b", second, (0,))])
    workshop.answers(engine, [workshop.request("a", first, (0,))])
    assert workshop.answers(engine, [workshop.request("b", second, (0,))]) == expected
    assert engine.stats().encoded_images == 1


def test_generated_blocks_are_reused_by_the_next_turn(workshop) -> None:
    engine = workshop.engine()
    request = workshop.request("a", workshop.questions(0)[0], (0,), **LONG)
    tokens = workshop.answers(engine, [request])["a"]
    turn = Prompt((*request.prompt.segments, TextSegment((*tokens, 40, 41, 42))))
    engine.submit(replace(request, request_id="b", prompt=turn), worker="local")
    report = workshop.drive(engine)["b"][0].report
    assert report.cached_tokens >= (request.prompt.tokens + len(tokens) - 1) // 16 * 16


def test_a_fully_cached_prompt_computes_its_last_token(workshop, peer) -> None:
    text = tuple(range(20, 52))
    request = workshop.request("a", "x", **LONG)
    request = replace(request, prompt=Prompt((TextSegment(text),)))
    engine = workshop.engine()
    expected = peer(request)
    assert workshop.answers(engine, [request])["a"] == expected
    engine.submit(request, worker="local")
    outputs = workshop.drive(engine)["a"]
    assert [token for output in outputs for token in output.token_ids] == expected
    assert outputs[0].report.computed_tokens == 1


def test_another_namespace_shares_no_block(workshop) -> None:
    engine = workshop.engine()
    question = workshop.questions(0)[0]
    workshop.answers(engine, [workshop.request("a", question, (0,))])
    engine.submit(workshop.request("b", question, (0,), namespace=b"o" * 32), worker="local")
    assert workshop.drive(engine)["b"][0].report.cached_tokens == 0


def test_a_resumed_request_goes_on_as_if_uninterrupted(workshop) -> None:
    for sampling in (LONG, {**LONG, "temperature": 0.9, "top_p": 0.95, "seed": 7, "presence_penalty": 0.4}):
        request = workshop.request("a", workshop.questions(1)[0], (1,), **sampling)
        whole = workshop.answers(workshop.engine(), [request])["a"]
        resumed = replace(request, attempt=1, resume_token_ids=tuple(whole[:9]))
        assert workshop.answers(workshop.engine(), [resumed])["a"] == whole[9:]


def test_sampled_tokens_do_not_depend_on_the_batch(workshop) -> None:
    sampling = {**LONG, "temperature": 1.2, "seed": 5}
    request = workshop.request("s", workshop.questions(2)[0], (2,), **sampling)
    alone = workshop.answers(workshop.engine(), [request])["s"]
    others = [workshop.request(f"o{n}", "hello", temperature=0.7, seed=n) for n in range(3)]
    assert workshop.answers(workshop.engine(max_step_tokens=64), [*others, request])["s"] == alone


@pytest.mark.parametrize("keep", [49, 12])
def test_visionzip_survivors_keep_their_raster_positions(workshop, peer, keep) -> None:
    plan = CompressionPlan(visual=normalise(visual_method("visionzip"), {"keep": keep}, "visual"))
    request = workshop.request("v", workshop.questions(0)[0], (0, 1), visual=plan, max_tokens=8, min_tokens=8)
    engine = workshop.engine(max_step_tokens=40)
    tokens = workshop.answers(engine, [request])["v"]
    language = peer.model.model.language_model
    embed = language.get_input_embeddings()
    inputs, positions, position = [], [], 0
    for segment in request.prompt.segments:
        if isinstance(segment, MediaSegment):
            visual = engine.image_cache.get(segment.key)
            assert visual.embeds.shape[0] == segment.tokens == keep
            assert visual.raw_tokens == segment.raw_tokens == 196
            inputs.append(visual.embeds.clone())
            positions.append(visual.positions + position)
        else:
            inputs.append(embed(torch.tensor(segment.token_ids)))
            positions.append(torch.arange(position, position + segment.tokens))
        position += segment.raw_tokens
    expected = []
    with torch.inference_mode():
        for _ in range(8):
            hidden = language(
                inputs_embeds=torch.cat(inputs)[None],
                position_ids=torch.cat(positions)[None],
                # Without a mask, transformers takes a gap in the positions for the start of another sequence.
                attention_mask=torch.ones(1, sum(len(part) for part in inputs), dtype=torch.int64),
                use_cache=False,
            ).last_hidden_state
            logits = peer.model.lm_head(hidden[0, -1])
            logits[sorted(workshop.model.eos_token_ids)] = -torch.inf
            expected.append(int(logits.argmax()))
            inputs.append(embed(torch.tensor(expected[-1:])))
            positions.append(torch.tensor([position]))
            position += 1
    assert tokens == expected


def test_visual_methods_do_not_share_blocks_or_embeddings(workshop) -> None:
    engine = workshop.engine()
    question = workshop.questions(0)[0]
    plan = CompressionPlan(visual=normalise(visual_method("visionzip"), {"keep": 49}, "visual"))
    workshop.answers(engine, [workshop.request("a", question, (0,))])
    engine.submit(workshop.request("b", question, (0,), visual=plan), worker="local")
    report = workshop.drive(engine)["b"][0].report
    assert report.cached_tokens < 16
    assert report.kv_bytes_raw - report.kv_bytes_kept == (196 - 49) * engine.layout.token_bytes


def test_generation_ends_by_length_stop_token_and_context(workshop) -> None:
    def end(engine, **sampling):
        engine.submit(workshop.request("e", "hello there", **sampling), worker="local")
        outputs = workshop.drive(engine)["e"]
        return outputs[-1].finish_reason, [token for output in outputs for token in output.token_ids]

    reason, tokens = end(workshop.engine(), max_tokens=5, min_tokens=5)
    assert (reason, len(tokens)) == (FinishReason.LENGTH, 5)
    reason, stopped = end(workshop.engine(), max_tokens=5, min_tokens=1, stop_token_ids=(tokens[1],))
    assert (reason, stopped) == (FinishReason.STOP, tokens[:2])
    prompt = workshop.request("e", "hello there").prompt.tokens
    reason, tokens = end(workshop.engine(max_model_len=prompt + 3), max_tokens=500, ignore_eos=True)
    assert (reason, len(tokens)) == (FinishReason.LENGTH, 3)


def test_eos_ends_unless_ignored(workshop) -> None:
    request = workshop.request("e", workshop.questions(0)[0], (0,), max_tokens=30)
    engine = workshop.engine()
    tokens = workshop.answers(engine, [request])["e"]
    assert tokens[-1] in workshop.model.eos_token_ids
    ignoring = replace(request, sampling=replace(request.sampling, ignore_eos=True))
    longer = workshop.answers(engine, [ignoring])["e"]
    assert longer[: len(tokens)] == tokens
    assert len(longer) == 30


def test_what_can_never_run_is_refused_with_the_reason(workshop) -> None:
    engine = workshop.engine(max_model_len=256)
    with pytest.raises(ContextLengthError, match="context holds 256"):
        engine.submit(workshop.request("a", "x", (0, 1)), worker="local")
    request = workshop.request("a", "x")
    with pytest.raises(InvalidRequestError, match="empty"):
        engine.submit(replace(request, prompt=Prompt(())), worker="local")
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        engine.submit(replace(request, prompt=Prompt((TextSegment((768,)),))), worker="local")
    engine.submit(request, worker="local")
    with pytest.raises(InvalidRequestError, match="here already"):
        engine.submit(request, worker="local")
    assert set(workshop.drive(engine)) == {"a"}


def test_a_full_waiting_queue_refuses_one_more(workshop) -> None:
    engine = workshop.engine(max_waiting=2)
    for number in range(2):
        engine.submit(workshop.request(f"w{number}", "x"), worker="local")
    with pytest.raises(OverloadedError, match="waiting queue is full"):
        engine.submit(workshop.request("w2", "x"), worker="local")


def test_a_bad_image_fails_its_own_request_alone(workshop) -> None:
    engine = workshop.engine()
    good = workshop.request("good", workshop.questions(0)[0], (0,))
    bad = workshop.request("bad", workshop.questions(1)[0], (1,))
    entry = bad.media[0]
    missing = workshop.request("missing", workshop.questions(2)[0], (2,))
    wrong = workshop.request("wrong", workshop.questions(4)[0], (4,))
    segments = [replace(s, tokens=100) if isinstance(s, MediaSegment) else s for s in wrong.prompt.segments]
    for request in (
        good,
        replace(bad, media=(replace(entry, data=entry.data[:200]),)),
        replace(missing, media=()),
        replace(wrong, prompt=Prompt(tuple(segments))),
    ):
        engine.submit(request, worker="local")
    outputs = workshop.drive(engine)
    assert outputs["good"][-1].finish_reason is FinishReason.STOP
    for name, said in (("bad", "cannot be decoded"), ("missing", "carries 0 images"), ("wrong", "room for 100")):
        assert outputs[name][-1].finish_reason is FinishReason.ERROR
        assert said in outputs[name][-1].error
    assert engine.pool.used_groups == 0


def test_a_request_past_its_deadline_ends_with_an_error(workshop) -> None:
    now = [100.0]
    engine = workshop.engine(lambda: now[0])
    for name, timeout in (("slow", 5.0), ("fine", 500.0)):
        engine.submit(
            replace(workshop.request(name, "x", max_tokens=4, min_tokens=4), timeout_s=timeout), worker="local"
        )
    engine.step()
    now[0] += 6
    outputs = workshop.drive(engine)
    assert (outputs["slow"][-1].finish_reason, outputs["slow"][-1].error) == (
        FinishReason.ERROR,
        "the request's 5 s are over",
    )
    assert outputs["fine"][-1].finish_reason is not FinishReason.ERROR


def test_higher_priority_is_served_first(workshop) -> None:
    engine = workshop.engine(max_running=1)
    for name, priority in (("low", 0), ("high", 3)):
        engine.submit(replace(workshop.request(name, f"x {name}", max_tokens=3), priority=priority), worker="local")
    assert list(workshop.drive(engine)) == ["high", "low"]


def test_cancelling_at_any_step_leaves_nothing_in_use(workshop) -> None:
    generator = torch.Generator().manual_seed(3)
    engine = workshop.engine(blocks=64, max_model_len=512, max_step_tokens=90)
    names: list[str] = []
    for number in range(120):
        draw = torch.randint(0, 100, (3,), generator=generator).tolist()
        scenes = (draw[0] % 3,) if draw[0] < 40 else ()
        if len(names) < 12:
            request = workshop.request(f"c{number}", f"q {draw[1] % 4}", scenes, max_tokens=1 + draw[1] % 20)
            engine.submit(request, worker="prefill" if draw[2] % 5 == 0 else "local")
            names.append(request.request_id)
        if draw[2] % 3 == 0:
            engine.cancel(names.pop(draw[1] % len(names)), 0)
        for output in engine.step():
            if output.finish_reason is not None:
                names.remove(output.request_id)
        engine.check_integrity()
    for name in names:
        assert engine.cancel(name, 0)
    engine.check_integrity()
    assert (engine.pool.used_groups, engine.has_work, engine.cancel("c0", 0)) == (0, False, False)
    assert engine.stats().running == engine.stats().waiting == 0


def test_a_context_beyond_the_models_own_is_refused(workshop) -> None:
    with pytest.raises(ConfigurationError, match="max_model_len"):
        workshop.engine(max_model_len=10**6)


def test_stats_count_what_was_done(workshop) -> None:
    engine = workshop.engine()
    workshop.answers(engine, [workshop.request("a", "hello", max_tokens=4, min_tokens=4)])
    stats = engine.stats()
    assert stats.decode_tokens == 3
    assert stats.prefill_tokens == stats.prefix_query_tokens == workshop.request("a", "hello").prompt.tokens
    assert stats.step_ms > 0
    assert stats.prefill_tokens_per_s > 0
    assert stats.kv_blocks_total == engine.pool.groups
