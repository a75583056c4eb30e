"""KV computed by one engine and decoded by another, in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prismserve.core.errors import EngineError, LeaseExpiredError, OverloadedError, TransferError
from prismserve.core.prompt import block_keys, elements
from prismserve.core.types import FinishReason

LONG = {"max_tokens": 20, "min_tokens": 20}


class Sink:
    """Remembers what it was told, and reads each layer's KV as soon as it is final."""

    def __init__(self, engine, view) -> None:
        self.engine, self.view = engine, view
        self.calls: list[tuple[int, int, int]] = []
        self.pieces = []
        for layer in range(engine.layout.layers):
            self.take(layer, 0, view.cached_tokens)

    def take(self, layer: int, start: int, tokens: int) -> None:
        self.pieces.append((layer, start, *self.engine.pool.read(layer, self.view.table, start, tokens)))

    def layer_ready(self, layer: int, start_token: int, tokens: int) -> None:
        self.calls.append((layer, start_token, tokens))
        self.take(layer, start_token, tokens)


def prefill(workshop, engine, request):
    """Run a prefill job; its sink, first token and report."""
    sinks = []
    engine.submit(request, worker="prefill", sink_factory=lambda view: sinks.append(Sink(engine, view)) or sinks[0])
    outputs = workshop.drive(engine)[request.request_id]
    assert len(outputs) == 1
    assert outputs[0].finish_reason is None
    return sinks[0], outputs[0]


def hand_over(engine, request, sink, output) -> None:
    ticket = engine.begin_import(request)
    write = engine.import_writer(ticket)
    for layer, start, keys, values in sink.pieces:
        skip = max(0, ticket.cached_tokens - start)
        if skip < keys.shape[0]:
            write(layer, start + skip, keys[skip:], values[skip:])
    engine.check_integrity()
    engine.finish_import(ticket, request, output.token_ids, sink.view.next_position, output.report)


@pytest.mark.parametrize("sampling", [LONG, {**LONG, "temperature": 0.8, "seed": 4, "frequency_penalty": 0.3}])
@pytest.mark.parametrize("step_tokens", [64, 2048])
def test_imported_kv_gives_the_tokens_of_a_local_run(workshop, step_tokens, sampling) -> None:
    questions = workshop.questions(0)[:3]
    requests = [workshop.request(f"t{n}", text, (0,), **sampling) for n, text in enumerate(questions)]
    expected = workshop.answers(workshop.engine(), requests)
    source, target = workshop.engine(max_step_tokens=step_tokens), workshop.engine()
    got = {}
    for request in requests:
        sink, output = prefill(workshop, source, request)
        hand_over(target, request, sink, output)
        source.release_export(request.request_id, 0)
    for name, outputs in workshop.drive(target).items():
        got[name] = [token for item in outputs for token in item.token_ids]
        assert outputs[0].report is not None
        assert all(item.report is None for item in outputs[1:])
    assert got == expected
    for engine in (source, target):
        engine.check_integrity()
        assert engine.pool.used_groups == 0
    assert target.stats().prefix_hit_tokens >= 2 * 192


def test_every_layer_of_every_chunk_is_announced_once_in_order(workshop) -> None:
    engine = workshop.engine(max_step_tokens=90)
    request = workshop.request("a", workshop.questions(0)[0], (0,))
    sink, _ = prefill(workshop, engine, request)
    starts = list(range(0, request.prompt.tokens, 90))
    spans = [(start, min(90, request.prompt.tokens - start)) for start in starts]
    assert sink.calls == [(layer, *span) for span in spans for layer in range(engine.layout.layers)]
    assert sink.view.layer_tokens == (request.prompt.tokens,) * engine.layout.layers


def test_an_export_keeps_its_blocks_until_released(workshop) -> None:
    engine = workshop.engine()
    request = workshop.request("a", "hello", **LONG)
    prefill(workshop, engine, request)
    assert engine.pool.used_groups > 0
    engine.release_export("a", 0)
    engine.release_export("a", 0)
    assert engine.pool.used_groups == 0


def test_an_exports_table_does_not_change_when_others_publish_the_same_blocks(workshop) -> None:
    engine = workshop.engine(prefix_caching=True)
    request = workshop.request("a", workshop.questions(0)[0], (0,))
    one, _ = prefill(workshop, engine, request)
    two, _ = prefill(workshop, engine, replace(request, request_id="b"))
    assert two.view.cached_tokens >= 192
    for layer in range(engine.layout.layers):
        for sink in (one, two):
            keys, _ = engine.pool.read(layer, sink.view.table, 0, 192)
            first = torch.cat([p[2] for p in one.pieces if p[0] == layer])
            assert torch.equal(keys, first[:192])


def test_a_sink_that_fails_ends_its_own_request_alone(workshop) -> None:
    class Broken:
        def layer_ready(self, layer: int, start_token: int, tokens: int) -> None:
            raise TransferError("the link is down")

    engine = workshop.engine()
    engine.submit(workshop.request("bad", "hello"), worker="prefill", sink_factory=lambda view: Broken())
    engine.submit(workshop.request("good", "good morning"), worker="local")
    outputs = workshop.drive(engine)
    assert (outputs["bad"][-1].finish_reason, outputs["bad"][-1].error) == (FinishReason.ERROR, "the link is down")
    assert outputs["good"][-1].finish_reason is not FinishReason.ERROR
    assert engine.pool.used_groups == 0


def test_a_first_token_that_ends_the_request_ends_it_at_once(workshop) -> None:
    source, target = workshop.engine(), workshop.engine()
    request = workshop.request("a", "hello", max_tokens=1, min_tokens=1)
    sink, output = prefill(workshop, source, request)
    hand_over(target, request, sink, output)
    assert target.pool.used_groups == 0
    (only,) = target.step()
    assert (only.finish_reason, only.token_ids) == (FinishReason.LENGTH, output.token_ids)


@pytest.mark.parametrize(("caching", "media"), [(True, False), (False, True), (False, False)])
def test_a_preempted_import_goes_on_from_its_cached_prefix_or_its_images_or_ends_with_an_error(
    workshop, caching, media
) -> None:
    target = workshop.engine(blocks=32, max_model_len=512, image_cache_bytes=0, prefix_caching=caching)
    requests = [workshop.request(f"i{n}", workshop.questions(n)[0], (n,), max_tokens=60, min_tokens=60) for n in (0, 1)]
    expected = workshop.answers(workshop.engine(), requests)
    for request in requests:
        sink, output = prefill(workshop, workshop.engine(), request)
        hand_over(target, request if media else replace(request, media=()), sink, output)
    outputs = workshop.drive(target)
    assert target.stats().preemptions > 0
    for name, tokens in expected.items():
        got = [token for item in outputs[name] for token in item.token_ids]
        if caching or media or name == "i0":
            assert got == tokens
        else:
            assert got == tokens[: len(got)]
            assert "must be encoded" in outputs[name][-1].error
    assert target.pool.used_groups == 0


def test_aborting_or_cancelling_an_import_frees_it_and_refuses_late_writes(workshop) -> None:
    engine = workshop.engine()
    request = workshop.request("a", workshop.questions(0)[0], (0,))
    for end in ("abort", "cancel"):
        ticket = engine.begin_import(request)
        write = engine.import_writer(ticket)
        piece = torch.ones(4, engine.layout.kv_heads, engine.layout.head_dim)
        write(0, 0, piece, piece)
        if end == "abort":
            engine.abort_import(ticket)
            engine.abort_import(ticket)
        else:
            assert engine.cancel("a", 0)
        engine.check_integrity()
        assert engine.pool.used_groups == 0
        with pytest.raises(LeaseExpiredError):
            write(0, 0, piece, piece)
        with pytest.raises(EngineError, match="has ended"):
            engine.finish_import(ticket, request, (1,), request.prompt.raw_tokens, None)
    assert engine.cached_keys() == []


def test_an_import_that_does_not_fit_what_is_said_is_refused(workshop) -> None:
    engine = workshop.engine()
    request = workshop.request("a", "hello")
    ticket = engine.begin_import(request)
    for tokens, position, said in (
        ((), request.prompt.raw_tokens, "at least one token"),
        ((1,), 3, "at position 3"),
        ((9999,), request.prompt.raw_tokens, "vocabulary"),
    ):
        with pytest.raises(EngineError, match=said):
            engine.finish_import(ticket, request, tokens, position, None)
    engine.abort_import(ticket)
    assert engine.pool.used_groups == 0


def test_imports_are_bounded_by_running_slots_and_blocks(workshop) -> None:
    engine = workshop.engine(max_running=2)
    for number in range(2):
        engine.begin_import(workshop.request(f"a{number}", "hello"))
    with pytest.raises(OverloadedError, match="running slots"):
        engine.begin_import(workshop.request("a2", "hello"))
    small = workshop.engine(blocks=20, max_model_len=320)
    small.begin_import(workshop.request("b0", "q", (0,)))
    with pytest.raises(OverloadedError, match="KV blocks are needed"):
        small.begin_import(workshop.request("b1", "q", (1,)))


def test_an_adopted_prefix_serves_the_submit_that_follows(workshop) -> None:
    source, target = workshop.engine(), workshop.engine()
    first, second = workshop.questions(0)[:2]
    workshop.answers(source, [workshop.request("a", first, (0,))])
    request = workshop.request("b", second, (0,), **LONG)
    keys = block_keys(request.namespace, elements(request.prompt), 16)
    pinned = source.pin_blocks(keys)
    assert pinned.tokens >= 192
    ticket = target.adopt_prefix_begin(request, len(pinned.table))
    write = target.import_writer(ticket)
    for layer in range(target.layout.layers):
        write(layer, 0, *source.pool.read(layer, pinned.table, 0, pinned.tokens))
    target.check_integrity()
    target.adopt_prefix_finish(ticket, request)
    source.unpin(pinned.pin_id)
    source.unpin(pinned.pin_id)
    assert target.cached_keys() == keys[: len(pinned.table)]
    target.submit(request, worker="local")
    outputs = workshop.drive(target)["b"]
    assert outputs[0].report.cached_tokens >= 192
    expected = workshop.answers(workshop.engine(), [request])["b"]
    assert [token for item in outputs for token in item.token_ids] == expected
    assert source.pool.used_groups == target.pool.used_groups == 0


def test_pinned_blocks_are_not_evicted(workshop) -> None:
    engine = workshop.engine(blocks=16, max_model_len=256)
    request = workshop.request("a", "hello there friend " * 4)
    workshop.answers(engine, [request])
    keys = engine.cached_keys()
    pinned = engine.pin_blocks(keys)
    workshop.answers(engine, [workshop.request("b", "something else " * 12, max_tokens=40, min_tokens=40)])
    engine.check_integrity()
    assert engine.pin_blocks(keys).table == pinned.table


def test_cancelling_ends_adoptions_too(workshop) -> None:
    engine = workshop.engine()
    request = workshop.request("a", workshop.questions(0)[0], (0,))
    engine.adopt_prefix_begin(request, 5)
    assert engine.cancel("a", 0)
    engine.check_integrity()
    assert engine.pool.used_groups == 0


def test_blocks_written_straight_into_the_pool_serve_as_those_that_were_copied(workshop) -> None:
    source, target = workshop.engine(), workshop.engine()
    first, second = workshop.questions(0)[:2]
    workshop.answers(source, [workshop.request("a", first, (0,))])
    request = workshop.request("b", second, (0,), **LONG)
    keys = block_keys(request.namespace, elements(request.prompt), 16)[:12]
    ticket = target.adopt_prefix_begin(request, len(keys))
    views = target.adopt_write_begin(ticket)
    for key, view in list(zip(keys, views, strict=True))[:10]:
        assert source.copy_block(key, view) is not None
    target.check_integrity()
    # The last two came back damaged, so they are not said to have been written.
    assert target.adopt_write_end(ticket, 10) == 10
    assert target.cached_keys() == list(keys[:10])
    target.check_integrity()
    target.submit(request, worker="local")
    outputs = workshop.drive(target)["b"]
    assert outputs[0].report.cached_tokens == 160
    expected = workshop.answers(workshop.engine(), [request])["b"]
    assert [token for item in outputs for token in item.token_ids] == expected


def test_a_cancelled_requests_blocks_are_nobodys_while_a_thread_still_writes_them(workshop) -> None:
    engine = workshop.engine()
    request = workshop.request("a", workshop.questions(0)[0], (0,))
    ticket = engine.adopt_prefix_begin(request, 5)
    assert len(engine.adopt_write_begin(ticket)) == 5
    engine.cancel("a", 0)
    engine.abort_import(ticket)
    engine.check_integrity()
    assert engine.pool.used_groups == 5
    assert engine.adopt_write_end(ticket, 5) == 0
    engine.check_integrity()
    assert engine.pool.used_groups == 0
    assert engine.cached_keys() == []


def test_a_pool_of_codes_is_not_written_directly(workshop) -> None:
    engine = workshop.engine(kv_cache_dtype="int8")
    ticket = engine.adopt_prefix_begin(workshop.request("a", workshop.questions(0)[0], (0,)), 5)
    assert engine.adopt_write_begin(ticket) is None
    engine.abort_import(ticket)
    assert engine.pool.used_groups == 0
