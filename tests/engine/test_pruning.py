"""Visual tokens that leave between layers: the same survivors and the same answer however the work was cut and mixed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from prismserve.compression import loader, presets
from prismserve.compression.base import Share
from prismserve.core.errors import EngineError, InvalidRequestError
from prismserve.core.types import MediaSegment, Request
from prismserve.engine.taps import Taps
from prismserve.models.processing import ChatMessage
from tests.engine.conftest import Workshop, tokens_of

METHODS = tuple(name for name in loader.names("prefill") if name != "none")
IDENTITY = {
    "framefusion": {"cost": 1.0},
    "sttm": {"spatial": 1.1, "temporal": 1.1},
    "asap": {"keep": 1.0, "blend": 0.0},
}
SMALL = {"framefusion": {"cost": 0.4}, "sttm": {"spatial": 0.9}}
LAYERS = 6


def plan(name: str, **params: Any) -> Any:
    return presets.resolve({"prefill": {"method": name, **params}}, "off")


def small(name: str) -> Any:
    return plan(name, **SMALL.get(name, {"keep": 0.2}))


def ask(workshop: Workshop, name: str, question: int, scene: int, compression: Any, **sampling: Any) -> Request:
    text = workshop.questions(scene)[question]
    return workshop.request(name, text, (scene,), visual=compression, **{"ignore_eos": True, **sampling})


def reports(outputs: Any) -> dict[str, Any]:
    return {name: next(item.report for item in items if item.report) for name, items in outputs.items()}


@pytest.mark.parametrize("name", METHODS)
def test_keeping_all_answers_as_without_the_method(workshop, name) -> None:
    requests = [ask(workshop, f"r{i}", i, 3, plan(name, **IDENTITY.get(name, {"keep": 1.0}))) for i in range(3)]
    off = [dataclasses.replace(r, compression=presets.resolve("off", "off")) for r in requests]
    assert workshop.answers(workshop.engine(), requests) == workshop.answers(workshop.engine(), off)


@pytest.mark.parametrize("name", METHODS)
def test_no_size_of_chunks_and_no_mixture_of_requests_changes_an_answer(workshop, name) -> None:
    requests = [ask(workshop, f"r{i}", i, 4, small(name)) for i in range(2)]
    expected = {}
    for request in requests:
        expected |= workshop.answers(workshop.engine(max_step_tokens=512), [request])
    others = [ask(workshop, "off", 0, 5, presets.resolve("off", "off")), ask(workshop, "fastv", 1, 4, small("fastv"))]
    for step_tokens in (13, 64, 200):
        engine = workshop.engine(max_step_tokens=step_tokens)
        got = workshop.answers(engine, [others[0], *requests, others[1]])
        assert {name: got[name] for name in expected} == expected
        assert engine.pool.used_groups == 0
        assert len(engine.pool.slab) == 0


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("name", ["fastv", "sparsevlm"])
def test_preemption_chooses_the_same_survivors(workshop, name, preemption) -> None:
    requests = [ask(workshop, f"r{i}", i, 6, small(name), max_tokens=40) for i in range(3)]
    expected = {}
    for request in requests:
        expected |= workshop.answers(workshop.engine(), [request], check=False)
    engine = workshop.engine(
        blocks=16, max_model_len=256, max_step_tokens=64, preemption=preemption, swap_bytes=16 << 20
    )
    assert workshop.answers(engine, requests) == expected
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "asap"])
def test_a_request_that_goes_on_elsewhere_is_pruned_as_it_was(workshop, name) -> None:
    request = ask(workshop, "a", 0, 7, small(name), max_tokens=14)
    whole = workshop.answers(workshop.engine(), [request])["a"]
    resumed = dataclasses.replace(request, attempt=1, resume_token_ids=tuple(whole[:5]))
    engine = workshop.engine(max_step_tokens=50)
    assert workshop.answers(engine, [resumed])["a"] == whole[5:]


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sttm"])
def test_an_export_carries_ragged_layers_into_an_import(workshop, name) -> None:
    request = ask(workshop, "a", 1, 8, small(name))
    expected = workshop.answers(workshop.engine(), [request])["a"]
    source, target = workshop.engine(max_step_tokens=60), workshop.engine()
    source.submit(request, worker="prefill")
    outputs = prefilled(source)
    view = source.export_view("a", 0)
    assert min(view.layer_tokens) < max(view.layer_tokens) == request.prompt.tokens
    ticket = target.begin_import(request)
    write = target.import_writer(ticket)
    for layer in range(LAYERS):
        write(layer, 0, *source.read_layer("a", 0, layer))
    wrong = (request.prompt.tokens + 1,) * LAYERS
    with pytest.raises(EngineError, match="do not fit"):
        target.finish_import(ticket, request, outputs, view.next_position, None, layer_tokens=wrong)
    target.finish_import(ticket, request, outputs, view.next_position, None, layer_tokens=view.layer_tokens)
    target.check_integrity()
    assert tokens_of(workshop.drive(target))["a"] == expected
    source.release_export("a", 0)
    assert source.pool.used_groups == target.pool.used_groups == 0


def prefilled(engine: Any) -> tuple[int, ...]:
    """Step until the first token is out."""
    for _ in range(100):
        for output in engine.step():
            return tuple(output.token_ids)
    message = "no token came"
    raise AssertionError(message)


def pairs_of_equal_length(workshop: Workshop, name: str, scene: int) -> list[tuple[Request, Request]]:
    """Requests with different questions of equally many tokens about one image."""
    questions = [ask(workshop, f"q{i}", i, scene, small(name)) for i in range(len(workshop.questions(scene)))]
    found = [
        (one, other)
        for i, one in enumerate(questions)
        for other in questions[i + 1 :]
        if one.prompt.tokens == other.prompt.tokens and one.prompt != other.prompt
    ]
    return found[:2]


def media_kv(workshop: Workshop, request: Request) -> list[tuple[torch.Tensor, ...]]:
    """K and V of each layer up to the end of the last image, as an export would send them."""
    engine = workshop.engine()
    engine.submit(request, worker="prefill")
    prefilled(engine)
    segments = request.prompt.segments
    behind = 0
    for segment in reversed(segments):
        if isinstance(segment, MediaSegment):
            break
        behind += segment.tokens
    return [
        tuple(part[: part.shape[0] - behind].clone() for part in engine.read_layer(request.request_id, 0, layer))
        for layer in range(LAYERS)
    ]


@pytest.mark.parametrize("name", METHODS)
def test_two_questions_leave_equal_kv_of_the_image_if_and_only_if_the_method_says_so(workshop, name) -> None:
    method = loader.prefill_method(name)
    config = loader.config_of(small(name).prefill, "prefill")
    first = min(cut.layer for cut in method.cuts(config, LAYERS))
    equal = []
    for scene in (3, 5):
        for one, other in pairs_of_equal_length(workshop, name, scene):
            left, right = media_kv(workshop, one), media_kv(workshop, other)
            for layer in range(first):
                assert all(map(torch.equal, left[layer], right[layer])), "below the first cut nothing differs"
            equal.append(all(all(map(torch.equal, a, b)) for a, b in zip(left, right, strict=True)))
    assert len(equal) >= 3
    assert all(equal) == (method.share in {Share.AGNOSTIC, Share.AGNOSTIC_IN_MODEL})


class Recorder:
    """Attention over one sequence with every score written out and remembered."""

    def __init__(self) -> None:
        self.rows: dict[int, torch.Tensor] = {}
        self.held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if layer in self.held:
            k, v = (torch.cat(pair) for pair in zip(self.held[layer], (k, v), strict=True))
        self.held[layer] = k, v
        self.rows[layer] = full_attention(q, k)
        wide = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return torch.einsum("hts,shd->thd", self.rows[layer], wide)


def full_attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[H, T, S] causal probabilities; the queries are the last T of S."""
    wide = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("thd,shd->hts", q, wide) / math.sqrt(q.shape[-1])
    mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


@torch.inference_mode()
def slowly(workshop: Workshop, engine: Any, request: Request, cuts: dict[int, int], *, after: bool) -> list[int]:
    """Greedy tokens with whole attention matrices: FastV, or PyramidDrop with ``after``, one layer after the other."""
    decoder, recorder, segments = workshop.model.decoder, Recorder(), request.prompt.segments
    rows, visual = [], []
    for segment in segments:
        if isinstance(segment, MediaSegment):
            image = engine.image_cache.get(segment.key)
            visual = list(range(len(rows), len(rows) + segment.tokens))
            rows.extend(image.embeds)
        else:
            rows.extend(decoder.embed(torch.tensor(segment.token_ids)))
    x, positions, out = torch.stack(rows), torch.arange(len(rows)), []
    step_positions = positions
    for _ in range(request.sampling.max_tokens):
        for layer in range(LAYERS):
            if layer in cuts and not out:
                if after:
                    q, k, _ = decoder.project(layer, x, decoder.rotary(step_positions))
                    attention = full_attention(q, k)
                else:
                    attention = recorder.rows[layer - 1]
                score = attention[:, -1, visual].mean(0)
                keep = {visual[i] for i in score.argsort(descending=True)[: cuts[layer]].tolist()}
                stay = [i for i in range(x.shape[0]) if i not in set(visual) or i in keep]
                visual = [place for place, i in enumerate(stay) if i in keep]
                x, step_positions = x[stay], step_positions[stay]
            x = decoder.layer(layer, x, decoder.rotary(step_positions), recorder)
        out.append(int(decoder.logits(x[-1:]).argmax()))
        x = decoder.embed(torch.tensor(out[-1:]))
        step_positions = torch.tensor([len(positions) + len(out) - 1])
    return out


@pytest.mark.parametrize(
    ("name", "cuts", "after"),
    [("fastv", {2: 20}, False), ("pyramiddrop", {2: 91, 3: 43, 4: 20}, True)],
)
def test_answers_equal_those_of_whole_attention_matrices(workshop, name, cuts, after) -> None:
    for scene in (10, 11):
        request = ask(workshop, "a", scene % 2, scene, plan(name, keep=20))
        engine = workshop.engine()
        got = workshop.answers(engine, [request])["a"]
        assert got == slowly(workshop, engine, request, cuts, after=after)


def test_text_before_the_image_is_shared_among_requests_of_the_plan(workshop) -> None:
    history = [ChatMessage("user", ("Describe the image. " * 12,)), ChatMessage("assistant", ("a red circle",))]
    requests = [
        workshop.request(f"r{i}", workshop.questions(3)[i], (3,), visual=plan("fastv"), history=history)
        for i in range(2)
    ]
    engine = workshop.engine(max_step_tokens=24)
    outputs = []
    for request in requests:
        engine.submit(request, worker="local")
        outputs.append(workshop.drive(engine))
    first, second = (reports(output)[f"r{i}"] for i, output in enumerate(outputs))
    assert first.cached_tokens == 0
    assert second.cached_tokens == requests[1].prompt.segments[0].tokens // 16 * 16 > 0
    alone = workshop.answers(workshop.engine(), [requests[1]])
    assert tokens_of(outputs[1]) == alone
    assert len(engine.cached_keys()) == second.cached_tokens // 16, "nothing behind the first image is published"


def test_text_alone_passes_a_method_by(workshop) -> None:
    request = workshop.request("a", "How many shapes are there?", (), visual=plan("fastv"))
    off = dataclasses.replace(request, compression=presets.resolve("off", "off"))
    assert workshop.answers(workshop.engine(), [request]) == workshop.answers(workshop.engine(), [off])


def test_two_images_share_one_budget(workshop) -> None:
    request = workshop.request("a", "How many shapes are there?", (3, 4), visual=plan("fastv", keep=50))
    outputs = workshop.drive((engine := workshop.engine(max_step_tokens=70)) and submitted(engine, request))
    assert reports(outputs)["a"].visual_tokens_by_cut == (50,)


def submitted(engine: Any, request: Request) -> Any:
    engine.submit(request, worker="local")
    return engine


def test_what_cannot_be_done_is_refused(workshop) -> None:
    engine = workshop.engine()
    request = ask(workshop, "a", 0, 3, plan("fastv"))
    with pytest.raises(InvalidRequestError, match="cannot be tapped"):
        engine.submit(request, worker="local", taps=Taps.at([1], [5]))
    with pytest.raises(InvalidRequestError, match="between 1 and 5"):
        engine.submit(ask(workshop, "b", 0, 3, plan("fastv", layer=6)), worker="local")
    both = presets.resolve({"visual": {"method": "uniform", "keep": 49}, "prefill": "sttm"}, "off")
    with pytest.raises(InvalidRequestError, match="needs every token"):
        engine.submit(ask(workshop, "c", 0, 3, both), worker="local")
