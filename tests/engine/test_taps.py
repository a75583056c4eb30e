from __future__ import annotations

import pytest
import torch

from prismserve.core.errors import EngineError, InvalidRequestError
from prismserve.engine.taps import ROWS_MAX, Taps, last_rows, score_rows
from tests.engine.small_text import HEAD_DIM, HEADS, KV_HEADS, LAYERS, Driver

PROMPT = 41


@pytest.fixture(scope="module")
def truth(text):
    """By layer: probabilities [rows, heads, keys] and log-sum-exps [rows, heads] of the whole prompt, written out."""
    ids, kept = torch.tensor(text.prompt(1, PROMPT)), {}

    class Recorder:
        def attend(self, layer, q, k, v):
            keys, values = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (k, v))
            scores = torch.einsum("qhd,khd->qhk", q, keys) * HEAD_DIM**-0.5
            hidden = torch.ones(len(q), len(q)).triu(1).bool()
            scores = scores.masked_fill(hidden[:, None, :], -torch.inf)
            kept[layer] = scores.softmax(-1), scores.logsumexp(-1)
            return torch.einsum("qhk,khd->qhd", kept[layer][0], values)

    decoder = text.model.decoder
    with torch.inference_mode():
        x, rotary, recorder = decoder.embed(ids), decoder.rotary(torch.arange(PROMPT)), Recorder()
        for layer in range(LAYERS):
            x = decoder.layer(layer, x, rotary, recorder)
    return kept


def tapped(text, engine, taps: Taps, worker: str = "local"):
    engine.submit(text.request("t", text.prompt(1, PROMPT), 3), worker=worker, taps=taps)
    return Driver(engine).run()["t"]


RECIPES = {"R1": last_rows(PROMPT), "R2": last_rows(PROMPT, 16), "R3": (2, 3, 19, 36, 40)}


@pytest.mark.parametrize("slots", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("step_tokens", [3, 16, 512])
def test_tapped_rows_are_the_rows_of_the_attention_matrix(text, truth, slots, step_tokens) -> None:
    taps = Taps.at((0, 2), slots)
    engine = text.engine(max_step_tokens=step_tokens)
    assert tapped(text, engine, taps) == text.expected(text.prompt(1, PROMPT), 3)
    for layer in (0, 2):
        scores = taps.scores(layer)
        assert scores.slots.tolist() == list(slots)
        seen = max(slots) + 1
        torch.testing.assert_close(scores.probabilities[:, :, :seen], truth[layer][0][list(slots)][:, :, :seen])
        torch.testing.assert_close(scores.lse, truth[layer][1][list(slots)])
        assert scores.probabilities.dtype is torch.float32
    with pytest.raises(EngineError, match="layer 1"):
        taps.scores(1)


def test_tapped_rows_are_computed_even_when_their_prefix_is_cached(text, truth) -> None:
    engine = text.engine()
    tapped(text, engine, Taps.at((1,), last_rows(PROMPT)))
    taps = Taps.at((1,), last_rows(PROMPT, 8))
    engine.submit(text.request("t", text.prompt(1, PROMPT), 3), worker="local", taps=taps)
    report = next(output.report for _ in range(9) for output in engine.step() if output.report)
    assert 8 <= report.computed_tokens <= 8 + 4
    rows = list(last_rows(PROMPT, 8))
    torch.testing.assert_close(taps.scores(1).probabilities, truth[1][0][rows])


def test_rows_of_ragged_layers_score_the_slots_that_are_left(text) -> None:
    engine = text.engine(max_step_tokens=20, prefix_caching=False)
    taps = Taps.at(range(LAYERS), last_rows(PROMPT, 4))
    engine.submit(text.request("t", text.prompt(1, PROMPT), 3), worker="local", taps=taps)
    engine.step()
    engine.compact("t", 0, 1, torch.tensor([0, 4, 19]))
    Driver(engine).run()
    widths = [taps.scores(layer).probabilities.shape[-1] for layer in range(LAYERS)]
    assert widths == [PROMPT, PROMPT - 17, PROMPT]
    for layer in range(LAYERS):
        sums = taps.scores(layer).probabilities.sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_row_sees_what_is_visible_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    q, keys = (torch.randn(shape, generator=generator) for shape in ((3, 4, 8), (6, 2, 8)))
    probabilities, lse = score_rows(q, keys, torch.tensor([1, 4, 6]), 0.5)
    assert probabilities[0, :, 1:].eq(0).all()
    assert probabilities[0, :, 0].eq(1).all()
    torch.testing.assert_close(lse[0, 3], 0.5 * (q[0, 3] @ keys[0, 1]))
    assert probabilities[1, :, 4:].eq(0).all()


def test_a_tap_that_makes_no_sense_is_refused(text) -> None:
    for layers, slots in (((), (0,)), ((0,), ()), ((0,), range(ROWS_MAX + 1)), ((-1,), (0,)), ((0,), (-1,))):
        with pytest.raises(InvalidRequestError, match="a tap names"):
            Taps.at(layers, slots)
    engine = text.engine()
    for layers, slots in (((LAYERS,), (0,)), ((0,), (PROMPT,))):
        with pytest.raises(InvalidRequestError, match="outside"):
            tapped(text, engine, Taps.at(layers, slots))
    assert not engine.has_work
