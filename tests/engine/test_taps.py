from __future__ import annotations

import pytest
import torch

from prismserve.core.errors import EngineError, InvalidRequestError
from prismserve.engine import runner as runner_module
from prismserve.engine.scoring import received_sums
from prismserve.engine.taps import ROWS_MAX, Taps, last_rows, score_rows, spread_rows
from tests.engine.rounding import QUANTISED, ROUNDED
from tests.engine.small_text import HEAD_DIM, HEADS, KV_HEADS, LAYERS, Driver, TextWorkshop

PROMPT = 41


class Recorder:
    """A dense attention over one sequence that writes every score out, and remembers all that taps can ask for.

    Attention reads keys and values as ``kv_format`` rounds them; scores are those of the keys before that.
    """

    def __init__(self, kv_format: str = "auto", windows: tuple[int, ...] = ()) -> None:
        self.rounded = ROUNDED[kv_format]
        self.windows = windows or (0,) * LAYERS
        self.exact, self.keys, self.values = ([torch.empty(0, KV_HEADS, HEAD_DIM)] * LAYERS for _ in range(3))
        self.q = [torch.empty(0, HEADS, HEAD_DIM)] * LAYERS
        self.inputs: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
        self.probabilities: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
        self.lse: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]

    def _rows(self, layer: int, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        keys = keys.repeat_interleave(HEADS // KV_HEADS, dim=1)
        scores = torch.einsum("qhd,khd->qhk", q, keys) * HEAD_DIM**-0.5
        slots, rows = torch.arange(len(keys)), torch.arange(len(keys) - len(q), len(keys))[:, None]
        seen = slots <= rows
        if self.windows[layer]:
            seen &= slots > rows - self.windows[layer]
        return scores.masked_fill(~seen[:, None], -torch.inf)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.q[layer] = torch.cat((self.q[layer], q))
        self.exact[layer] = torch.cat((self.exact[layer], k))
        self.keys[layer] = torch.cat((self.keys[layer], self.rounded(k)))
        self.values[layer] = torch.cat((self.values[layer], self.rounded(v)))
        scores = self._rows(layer, q, self.exact[layer])
        self.probabilities[layer] += scores.softmax(-1).unbind()
        self.lse[layer] += scores.logsumexp(-1).unbind()
        weights = self._rows(layer, q, self.keys[layer]).softmax(-1)
        return torch.einsum("qhk,khd->qhd", weights, self.values[layer].repeat_interleave(HEADS // KV_HEADS, dim=1))

    def compact(self, layer: int, keep: torch.Tensor) -> None:
        """``keep``: [KV_HEADS, k]."""
        for kept in (self.exact, self.keys, self.values):
            kept[layer] = torch.stack([kept[layer][keep[head], head] for head in range(KV_HEADS)], dim=1)
        by_head = keep.repeat_interleave(HEADS // KV_HEADS, dim=0)
        width = max(len(row[0]) for row in self.probabilities[layer])
        self.probabilities[layer] = [
            torch.nn.functional.pad(row, (0, width - row.shape[1])).gather(1, by_head)
            for row in self.probabilities[layer]
        ]

    @torch.inference_mode()
    def run(self, text, ids, start: int = 0):
        decoder = text.model.decoder
        x, rotary = decoder.embed(torch.tensor(ids)), decoder.rotary(torch.arange(start, start + len(ids)))
        for layer in range(LAYERS):
            self.inputs[layer] += x.unbind()
            x = decoder.layer(layer, x, rotary, self)
        return self

    def rows(self, layer: int, slots) -> torch.Tensor:
        """[r, heads, n] of the slots left at the end."""
        width = len(self.exact[layer])
        padded = [torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in self.probabilities[layer]]
        return torch.stack([padded[slot] for slot in slots])

    def summed(self, layer: int, slots) -> torch.Tensor:
        """Every pair of a row and a slot multiplied, then added up."""
        keys = self.exact[layer].repeat_interleave(HEADS // KV_HEADS, dim=1)
        return torch.einsum("qhd,khd->qhk", self.q[layer][list(slots)], keys).sum(0) * HEAD_DIM**-0.5


@pytest.fixture(scope="module")
def truth(text):
    """By layer: probabilities [rows, heads, keys] and log-sum-exps [rows, heads] of the whole prompt, written out."""
    recorder = Recorder().run(text, text.prompt(1, PROMPT))
    return {layer: (recorder.rows(layer, range(PROMPT)), torch.stack(recorder.lse[layer])) for layer in range(LAYERS)}


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
    for kinds in ({"received": (-1,)}, {"rows": range(ROWS_MAX + 1)}, {}):
        with pytest.raises(InvalidRequestError, match="a tap names"):
            Taps.at((0,), **kinds)
    engine = text.engine()
    with pytest.raises(InvalidRequestError, match="outside"):
        tapped(text, engine, Taps.at((0,), received=(PROMPT,)))
    for layers, slots in (((LAYERS,), (0,)), ((0,), (PROMPT,))):
        with pytest.raises(InvalidRequestError, match="outside"):
            tapped(text, engine, Taps.at(layers, slots))
    assert not engine.has_work


# ---- column sums, queries and layer inputs -------------------------------------------------------------------------

EVERY = range(PROMPT)


def everything(layers=range(LAYERS), received=EVERY) -> Taps:
    return Taps.at(layers, last_rows(PROMPT, 3), received=received, summed=(*range(9), 30), rows=(0, 17, 40))


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to the order in which three layers added up."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def check(taps: Taps, recorder: Recorder, received=EVERY, deep_tolerance: float = 1e-4) -> None:
    """All that was tapped is what the recorder has written out.

    Behind a rounding cache, a number on the edge between two codes may go the other way: ``deep_tolerance`` is for the
    layers after the first, which see what such a code has changed.
    """
    for layer in range(LAYERS):
        tolerance = deep_tolerance if layer else 1e-4
        sums = taps.received_sums(layer)
        assert sums.rows == len(received)
        close(sums.sums, recorder.rows(layer, received).sum(0), tolerance)
        summed = taps.summed_scores(layer)
        assert summed.rows == 10
        close(summed.sums, recorder.summed(layer, (*range(9), 30)), tolerance)
        close(taps.scores(layer).probabilities, recorder.rows(layer, last_rows(PROMPT, 3)), tolerance)
        rows = taps.kept_rows(layer)
        assert rows.slots.tolist() == [0, 17, 40]
        close(rows.queries, recorder.q[layer][[0, 17, 40]], tolerance)
        close(rows.inputs, torch.stack([recorder.inputs[layer][slot] for slot in (0, 17, 40)]), tolerance)


@pytest.mark.parametrize("received", [EVERY, spread_rows(PROMPT, 7)], ids=["all", "sample"])
@pytest.mark.parametrize("main_pass_lse", [False, True])
@pytest.mark.parametrize("step_tokens", [3, 16, 512])
def test_sums_over_rows_are_those_of_the_attention_matrix(
    text, step_tokens, main_pass_lse, received, monkeypatch
) -> None:
    monkeypatch.setattr(runner_module, "use_triton_on", lambda _: main_pass_lse)
    taps = everything(received=received)
    assert tapped(text, text.engine(max_step_tokens=step_tokens), taps) == text.expected(text.prompt(1, PROMPT), 3)
    check(taps, Recorder().run(text, text.prompt(1, PROMPT)), received)


def test_sums_are_made_in_tiles_that_add_up(monkeypatch) -> None:
    from prismserve.engine import scoring

    generator = torch.Generator().manual_seed(0)
    q, keys = torch.randn(50, 4, 8, generator=generator), torch.randn(50, 2, 8, generator=generator)
    visible, first = torch.arange(1, 51), (torch.arange(50) - 6).clamp(min=0)
    whole = received_sums(q, keys, visible, 0.5, first)
    torch.testing.assert_close(whole, score_rows(q, keys, visible, 0.5, first)[0].sum(0))
    largest = []
    plain = scoring._scores
    monkeypatch.setattr(scoring, "_TILE_ELEMENTS", 7 * 4 * 50)
    monkeypatch.setattr(scoring, "_scores", lambda *args: largest.append(plain(*args).numel()) or plain(*args))
    torch.testing.assert_close(received_sums(q, keys, visible, 0.5, first), whole)
    assert max(largest) == 7 * 4 * 50


def test_a_sample_of_rows_is_even_ends_with_the_last_and_is_never_too_long() -> None:
    assert spread_rows(10, 5) == (1, 3, 5, 7, 9)
    assert spread_rows(7, 3) == (1, 3, 6)
    assert spread_rows(3, 9) == (0, 1, 2)
    assert spread_rows(0, 3) == ()


def test_summed_rows_are_computed_even_when_their_prefix_is_cached_and_the_rest_is_not(text) -> None:
    engine = text.engine()
    tapped(text, engine, Taps.at((1,), last_rows(PROMPT)))
    taps = Taps.at((1,), received=range(20, PROMPT), summed=range(20, PROMPT))
    engine.submit(text.request("t", text.prompt(1, PROMPT), 3), worker="local", taps=taps)
    report = next(output.report for _ in range(9) for output in engine.step() if output.report)
    assert PROMPT - 20 <= report.computed_tokens <= PROMPT - 20 + 4
    recorder = Recorder().run(text, text.prompt(1, PROMPT))
    close(taps.received_sums(1).sums, recorder.rows(1, range(20, PROMPT)).sum(0))
    torch.testing.assert_close(taps.summed_scores(1).sums, recorder.summed(1, range(20, PROMPT)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv", ["auto", *QUANTISED])
def test_sums_of_ragged_layers_are_over_the_slots_that_are_left(text, kv) -> None:
    keep = torch.tensor([[0, 4, 19, 7], [1, 2, 18, 3]])
    engine = text.engine(max_step_tokens=20, prefix_caching=False, kv_cache_dtype=kv)
    taps = everything()
    ids = text.prompt(1, PROMPT)
    engine.submit(text.request("t", ids, 3), worker="local", taps=taps)
    recorder = Recorder(kv).run(text, ids[:20])
    engine.step()
    engine.compact("t", 0, 1, keep)
    recorder.compact(1, keep)
    Driver(engine).run()
    recorder.run(text, ids[20:], 20)
    check(taps, recorder, deep_tolerance=1e-4 if kv == "auto" else 3e-2)


@pytest.mark.parametrize("kv", QUANTISED)
@pytest.mark.parametrize("step_tokens", [7, 512])
def test_over_a_quantised_pool_scores_are_taken_before_quantising(text, kv, step_tokens) -> None:
    ids = text.prompt(1, PROMPT)
    engine = text.engine(max_step_tokens=step_tokens, kv_cache_dtype=kv)
    tapped(text, engine, Taps.at((0,), (0,)))
    taps = everything()
    assert tapped(text, engine, taps) == text.expected(ids, 3, None, kv), "a cached prefix is computed again"
    recorder = Recorder(kv).run(text, ids)
    check(taps, recorder, deep_tolerance=3e-2)
    recorder.exact = recorder.keys
    assert (taps.summed_scores(0).sums - recorder.summed(0, (*range(9), 30))).abs().max() > 1e-2, "rounding would show"
    assert all(state.keys is None for state in taps._states.values()), "exact keys are not kept"


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_a_prompt_preempted_half_way_counts_no_row_twice(text, kv, preemption) -> None:
    ids = text.prompt(1, PROMPT)
    engine = text.engine(max_step_tokens=16, preemption=preemption, kv_cache_dtype=kv, prefix_caching=False)
    taps = everything()
    engine.submit(text.request("t", ids, 3), worker="local", taps=taps)
    engine.step()
    engine.compact("t", 0, 1, torch.tensor([[0, 4, 7], [1, 2, 3]]))
    engine._stepper._preempt(engine._sequences["t", 0], [], alone=False)
    assert Driver(engine).all_finished()
    Driver(engine).run()
    recorder = Recorder(kv).run(text, ids[:16])
    recorder.compact(1, torch.tensor([[0, 4, 7], [1, 2, 3]]))
    check(taps, recorder.run(text, ids[16:], 16), deep_tolerance=1e-4 if kv == "auto" else 3e-2)


def test_a_finished_prompt_is_not_recorded_again_when_it_is_computed_again(text) -> None:
    engine = text.engine(preemption="recompute")
    taps = everything()
    engine.submit(text.request("t", text.prompt(1, PROMPT), 6), worker="local", taps=taps)
    driver = Driver(engine)
    driver.step()
    engine._stepper._preempt(engine._sequences["t", 0], [], alone=False)
    assert driver.run()["t"] == text.expected(text.prompt(1, PROMPT), 6)
    check(taps, Recorder().run(text, text.prompt(1, PROMPT)))


@pytest.mark.parametrize("step_tokens", [5, 512])
def test_rows_of_layers_with_a_window_see_the_window(step_tokens) -> None:
    windows = (0, 6, 11)
    sliding = TextWorkshop(windows=windows)
    taps = everything()
    tapped(sliding, sliding.engine(max_step_tokens=step_tokens), taps)
    check(taps, Recorder(windows=windows).run(sliding, sliding.prompt(1, PROMPT)))
