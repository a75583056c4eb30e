"""What decoding reads of the visual tokens: the same choices as written out slowly, and nobody else's business."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from prismserve.compression import presets
from prismserve.core.errors import EngineError, InvalidRequestError
from prismserve.core.types import MediaSegment, Request, TextSegment
from prismserve.engine.focused import FocusedAttention
from prismserve.engine.focusing import Focusing, plan_focusing
from prismserve.engine.graphs import DecodeGraphs
from prismserve.engine.run_item import RunItem
from tests.engine.conftest import Workshop, tokens_of
from tests.models.dense_backend import DenseBackend, dense_attention

LAYERS = 6


def plan(**params: Any) -> Any:
    return presets.resolve({"visual": {"method": "dycoke", "keep": 0.5, **params}}, "off")


def ask(workshop: Workshop, name: str, question: int, scene: int, compression: Any, **sampling: Any) -> Request:
    text = workshop.questions(scene)[question]
    return workshop.request(name, text, (scene,), visual=compression, **{"ignore_eos": True, **sampling})


class SlowFocus(DenseBackend):
    """DyCoke's second stage with every score written out: which visual slots each layer sees is a mask of keys."""

    def __init__(self, layers: int, scale: float, visual: list[int], layer: int, share: float, same: float) -> None:
        super().__init__(layers, scale)
        self._visual, self._layer, self._share, self._same = visual, layer, share, same
        self._before: torch.Tensor | None = None
        self._hidden: list[int] = []
        self.kept: list[tuple[int, ...]] = []

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        held = self._cache[layer]
        if held is None:
            return super().attend(layer, q, k, v)
        keys, values = torch.cat((held[0], k)), torch.cat((held[1], v))
        self._cache[layer] = (keys, values)
        if layer == self._layer - 1:
            self._look(q[0], keys)
        seen = [slot for slot in range(len(keys)) if layer < self._layer or slot not in self._hidden]
        return dense_attention(q, keys[seen], values[seen], self._scale)

    def _look(self, q: torch.Tensor, keys: torch.Tensor) -> None:
        group = q.shape[0] // keys.shape[1]
        rows = [((keys[:, h // group] @ q[h]) * self._scale).softmax(0) for h in range(q.shape[0])]
        scores = (sum(rows) / len(rows))[self._visual]
        again = self._before is not None and torch.cosine_similarity(scores, self._before, 0) >= self._same
        if not again:
            count = max(1, round(self._share * len(self._visual)))
            order = sorted(range(len(self._visual)), key=lambda place: (-float(scores[place]), place))
            read = {self._visual[place] for place in order[:count]}
            self._hidden = [slot for slot in self._visual if slot not in read]
        self._before = scores
        self.kept.append(tuple(slot for slot in self._visual if slot not in self._hidden))


def slow_answer(
    workshop: Workshop, request: Request, tokens: int, **params: Any
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Greedy tokens, and what each step after the first reads, by :class:`SlowFocus`."""
    decoder = workshop.model.decoder
    engine = workshop.engine()
    engine.submit(
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, max_tokens=1)), worker="local"
    )
    workshop.drive(engine)
    rows, positions, visual, start, position = [], [], [], 0, 0
    for segment in request.prompt.segments:
        if isinstance(segment, TextSegment):
            rows.append(decoder.embed(torch.tensor(segment.token_ids)))
            positions.append(torch.arange(segment.tokens) + position)
        else:
            held = engine.image_cache.get(segment.key)
            assert held is not None
            rows.append(held.embeds)
            positions.append(held.positions + position)
            visual += range(start, start + segment.tokens)
        start, position = start + segment.tokens, position + segment.positions
    backend = SlowFocus(LAYERS, decoder.config.head_dim**-0.5, visual, **params)
    x, at, answer = torch.cat(rows), torch.cat(positions), []
    for step in range(tokens):
        rotary = decoder.rotary(at)
        for layer in range(LAYERS):
            x = decoder.layer(layer, x, rotary, backend)
        answer.append(int(decoder.logits(x[-1:])[0].argmax()))
        x, at = decoder.embed(torch.tensor(answer[-1:])), torch.tensor([request.prompt.next_position + step])
    return answer, backend.kept


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, ...]]]:
    """Visual slots that each step of each request reads, recorded inside the engine."""
    found: dict[str, list[tuple[int, ...]]] = {}
    look = FocusedAttention._look

    def recording(self: FocusedAttention, focused: Any, layer: int, q: torch.Tensor) -> None:
        look(self, focused, layer, q)
        focusing: Focusing = focused.focusing
        visual = set(focusing.visual.tolist())
        slots = focusing.slots(focused.item.start + 1)
        name = focused.item.sequence.request.request_id
        found.setdefault(name, []).append(tuple(sorted(visual.intersection(slots))))

    monkeypatch.setattr(FocusedAttention, "_look", recording)
    return found


@pytest.mark.parametrize(("share", "same"), [(0.1, 2.0), (0.25, 0.9), (0.25, -1.0)])
@pytest.mark.parametrize("layer", [1, 3])
def test_each_step_reads_what_the_formula_says_and_answers_so(workshop, read, layer, share, same) -> None:
    params = {"decode": share, "decode_layer": layer, "settled": same}
    requests = [ask(workshop, f"r{i}", i, 3, plan(**params), max_tokens=10) for i in range(2)]
    answers = workshop.answers(workshop.engine(), requests)
    for request in requests:
        with torch.inference_mode():
            expected, kept = slow_answer(workshop, request, 10, layer=layer, share=share, same=same)
        assert answers[request.request_id] == expected
        assert read[request.request_id] == kept
    if same == 2.0:
        assert any(len(set(steps)) > 1 for steps in read.values()), "tokens come back"
    if same == -1.0:
        assert all(len(set(steps)) == 1 for steps in read.values()), "nothing is chosen anew"


def test_what_is_left_out_changes_what_is_computed(workshop) -> None:
    requests = [ask(workshop, f"r{i}", i, 4, plan(decode=0.02, decode_layer=1), logprobs=0) for i in range(2)]
    off = [dataclasses.replace(request, compression=plan()) for request in requests]
    focused, whole = (logprobs(workshop, batch) for batch in (requests, off))
    assert focused != whole
    assert [steps[0] for steps in focused] == [steps[0] for steps in whole], "the prompt is computed as ever"


def logprobs(workshop: Workshop, requests: list[Request]) -> list[list[float]]:
    found: dict[str, list[float]] = {}
    engine = workshop.engine()
    for request in requests:
        engine.submit(request, worker="local")
    for name, outputs in workshop.drive(engine).items():
        found[name] = [entry.logprob for output in outputs for entry in output.logprobs]
    return [found[request.request_id] for request in requests]


def test_reading_everything_is_off(workshop, monkeypatch) -> None:
    requests = [ask(workshop, f"r{i}", i, 5, plan(decode=1.0)) for i in range(2)]
    visual = next(iter(requests[0].prompt.media_segments())).tokens
    nearly = [dataclasses.replace(request, compression=plan(decode=1.0 - 0.1 / visual)) for request in requests]
    # Every slot is read, through blocks of one slot.
    expected = workshop.answers(workshop.engine(), nearly)
    monkeypatch.setattr(FocusedAttention, "__init__", None)
    assert workshop.answers(workshop.engine(), requests) == expected


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_a_quantised_pool_is_read_slot_by_slot(workshop, kv_dtype) -> None:
    requests = [ask(workshop, f"r{i}", i, 5, plan()) for i in range(2)]
    visual = next(iter(requests[0].prompt.media_segments())).tokens
    nearly = [dataclasses.replace(request, compression=plan(decode=1.0 - 0.1 / visual)) for request in requests]
    engines = [workshop.engine(kv_cache_dtype=kv_dtype) for _ in range(2)]
    assert workshop.answers(engines[0], nearly) == workshop.answers(engines[1], requests)


def test_no_mixture_of_requests_changes_an_answer(workshop) -> None:
    requests = [ask(workshop, f"r{i}", i, 4, plan(decode=0.1, decode_layer=1 + 2 * i)) for i in range(2)]
    expected = {}
    for request in requests:
        expected |= workshop.answers(workshop.engine(), [request])
    fastv = presets.resolve({"prefill": {"method": "fastv", "keep": 0.2}}, "off")
    others = [ask(workshop, "off", 0, 5, presets.resolve("off", "off")), ask(workshop, "fastv", 1, 4, fastv)]
    for step_tokens in (17, 200):
        engine = workshop.engine(max_step_tokens=step_tokens)
        got = workshop.answers(engine, [others[0], *requests, others[1]])
        assert {name: got[name] for name in expected} == expected
        assert engine.pool.used_groups == 0


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preemption_repeats_the_choices(workshop, preemption) -> None:
    requests = [ask(workshop, f"r{i}", i, 6, plan(keep=1.0, decode=0.1), max_tokens=40) for i in range(3)]
    expected = {}
    for request in requests:
        expected |= workshop.answers(workshop.engine(), [request], check=False)
    engine = workshop.engine(
        blocks=16, max_model_len=256, max_step_tokens=64, preemption=preemption, swap_bytes=16 << 20
    )
    assert workshop.answers(engine, requests) == expected
    assert engine.stats().preemptions > 0


def test_a_request_that_goes_on_elsewhere_repeats_the_choices(workshop) -> None:
    request = ask(workshop, "a", 0, 7, plan(decode=0.1), max_tokens=14)
    whole = workshop.answers(workshop.engine(), [request])["a"]
    resumed = dataclasses.replace(request, attempt=1, resume_token_ids=tuple(whole[:5]))
    assert workshop.answers(workshop.engine(max_step_tokens=50), [resumed])["a"] == whole[5:]


def test_a_decode_worker_chooses_for_itself(workshop) -> None:
    request = ask(workshop, "a", 1, 8, plan(decode=0.1))
    expected = workshop.answers(workshop.engine(), [request])["a"]
    source, target = workshop.engine(), workshop.engine()
    source.submit(request, worker="prefill")
    first = next(tuple(output.token_ids) for _ in range(100) for output in source.step())
    view = source.export_view("a", 0)
    ticket = target.begin_import(request)
    write = target.import_writer(ticket)
    for layer in range(LAYERS):
        write(layer, 0, *source.read_layer("a", 0, layer))
    target.finish_import(ticket, request, first, view.next_position, None)
    assert tokens_of(workshop.drive(target))["a"] == expected


def test_only_the_prompt_is_shared(workshop) -> None:
    engine = workshop.engine()
    request = ask(workshop, "a", 0, 2, plan(decode=0.1), max_tokens=40)
    answer = workshop.answers(engine, [request])["a"]
    assert len(engine.cached_keys()) == request.prompt.tokens // engine.config.block_tokens, "full blocks of it"
    longer = [*request.prompt.segments, TextSegment(tuple(answer))]
    other = dataclasses.replace(
        request, request_id="b", prompt=dataclasses.replace(request.prompt, segments=tuple(longer))
    )
    engine.submit(other, worker="local")
    report = next(output.report for output in engine.step())
    assert report is not None
    assert report.cached_tokens == request.prompt.tokens
    workshop.drive(engine)


def test_what_cannot_be_done_is_refused(workshop) -> None:
    engine = workshop.engine()
    both = presets.resolve(
        {"visual": {"method": "dycoke", "decode": 0.3, "keep": 1.0}, "prefill": {"method": "fastv"}}, "off"
    )
    for compression, what in [(both, "prefill method 'fastv'"), (plan(decode=0.3, decode_layer=LAYERS), "0 to 5")]:
        with pytest.raises(InvalidRequestError, match=what):
            engine.submit(ask(workshop, "a", 0, 0, compression), worker="local")
    request = ask(workshop, "a", 0, 0, plan(decode=0.3))
    spans = (dataclasses.make_dataclass("Span", ["start", "end"])(1, 5),)
    windows = dataclasses.replace(workshop.model.decoder.config, windows=(0,) * LAYERS, bidirectional_images=True)
    with pytest.raises(InvalidRequestError, match="sliding windows"):
        plan_focusing(request, spans, windows)
    engine.submit(request, worker="local")
    engine.step()
    with pytest.raises(EngineError, match="cannot be compacted"):
        engine.compact("a", 0, 0, torch.arange(3))


def test_recorded_graphs_leave_such_steps_alone(workshop) -> None:
    engine = workshop.engine()
    graphs = DecodeGraphs(workshop.model, engine.pool, 4, 64, lambda size, step: step())
    for share, accepted in ((1.0, True), (0.5, False)):
        name = f"r{share}"
        engine.submit(ask(workshop, name, 0, 0, plan(decode=share)), worker="local")
        engine.step()
        sequence = engine._sequences[(name, 0)]
        assert graphs.accepts([RunItem(sequence, sequence.cached, 1, samples=True)]) is accepted


def test_text_alone_has_nothing_to_choose(workshop) -> None:
    request = workshop.request("a", "What is seen?", visual=plan(decode=0.3))
    assert not any(isinstance(segment, MediaSegment) for segment in request.prompt.segments)
    assert plan_focusing(request, (), workshop.model.decoder.config) is None
