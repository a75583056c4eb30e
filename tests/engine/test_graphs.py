"""Decode steps over static buffers: the same tokens as without, whatever runs beside them."""

from __future__ import annotations

import pytest
import torch

from prismserve.engine import foundation
from prismserve.engine.config import EngineConfig
from prismserve.engine.graphs import CudaReplay, DecodeBuffers, batch_sizes, recordable, replay_for, size_for
from prismserve.engine.pool import KVPool
from prismserve.engine.run_item import RunItem
from prismserve.engine.sequence import Sequence, Work
from prismserve.engine.taps import Taps, last_rows
from tests.engine.small_text import BLOCK, LAYERS, NAMESPACE, Driver, TextWorkshop


class Calls:
    """Replays by calling, and counts the sizes it was asked for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, size, step):
        self.sizes.append(size)
        first = step().clone()
        assert torch.equal(step(), first), "a step may be repeated"
        return first


@pytest.fixture
def calls(monkeypatch) -> Calls:
    made = Calls()
    monkeypatch.setattr(foundation, "replay_for", lambda *_: made)
    return made


def test_sizes_grow_by_doubling_and_then_by_sixteen() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(5) == (1, 2, 4, 8)
    assert batch_sizes(9) == (1, 2, 4, 8, 16)
    assert batch_sizes(64) == (1, 2, 4, 8, 16, 32, 48, 64)
    assert [size_for(batch, batch_sizes(20)) for batch in (1, 3, 9, 17, 32, 33)] == [1, 4, 16, 32, 32, None]


def test_buffers_hold_each_row_and_point_the_rest_at_the_scratch_block(text) -> None:
    pool = KVPool(text.engine().layout, 20, scratch=True)
    buffers = DecodeBuffers(4, 8, pool)
    items = []
    for number, tokens in enumerate((9, 4)):
        request = text.request(f"q{number}", text.prompt(number, tokens))
        sequence = Sequence.create(number, request, Work.LOCAL, NAMESPACE, BLOCK, 0.0)
        sequence.append(50 + number, BLOCK)
        sequence.table = pool.allocate(3)
        items.append(RunItem(sequence, tokens, 1, samples=True))
    buffers.fill(items, 4)
    assert buffers.ids.tolist() == [50, 51, 0, 0]
    assert buffers.positions.tolist() == [9, 4, 0, 0]
    assert buffers.slots.tolist() == [2 * BLOCK + 1, 4 * BLOCK, 20 * BLOCK, 20 * BLOCK]
    assert buffers.kv_lens.tolist() == [10, 5, 1, 1]
    assert buffers.tables[0, :3].tolist() == [0, 1, 2]
    assert buffers.tables[1, :3].tolist() == [3, 4, 20]
    assert buffers.tables[2:, 0].tolist() == [20, 20]
    buffers.fill(items[:1], 2)
    assert buffers.slots.tolist()[:2] == [2 * BLOCK + 1, 20 * BLOCK]
    assert buffers.kv_lens.tolist()[:2] == [10, 1]


def test_the_scratch_block_is_never_handed_out(text) -> None:
    pool = KVPool(text.engine().layout, 3, scratch=True)
    assert sorted(pool.allocate(3)) == [0, 1, 2]
    assert (pool.free_groups, pool.scratch_group, pool.storage.shape[0]) == (0, 3, 4)


@pytest.mark.parametrize("kv", ["auto", "int8", "int4"])
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_any_batch_gives_the_same_tokens_through_the_buffers(text, calls, kv, preemption) -> None:
    engine = text.engine(30, kv_cache_dtype=kv, preemption=preemption, max_step_tokens=24)
    for number in range(5):
        engine.submit(text.request(f"s{number}", text.prompt(number, 22 + number, 9), 30 - number), worker="local")
    done = Driver(engine).run()
    assert done == {f"s{n}": text.expected(text.prompt(n, 22 + n, 9), 30 - n, None, kv) for n in range(5)}
    assert {1, 2, 4} <= set(calls.sizes)
    assert engine.stats().preemptions > 0


def test_logits_are_those_of_the_ordinary_step(text, calls, monkeypatch) -> None:
    engine = text.engine()
    for number in range(3):
        engine.submit(text.request(f"s{number}", text.prompt(number, 20), 8), worker="local")
    engine.step()
    runner = engine._stepper._runner
    graphed, compared = runner._graphs.run, []

    def both(items):
        got = graphed(items)
        runner._graphs, graphs = None, runner._graphs
        compared.append((got, runner.run(items, None)))
        runner._graphs = graphs
        return got

    monkeypatch.setattr(runner._graphs, "run", both)
    Driver(engine).run()
    assert len(compared) == 7
    for got, expected in compared:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_uniform_decoding_takes_the_ordinary_way(text, calls) -> None:
    engine = text.engine(prefix_caching=False)
    keep = {0: torch.tensor([0, 3, 5])}
    driver = Driver(engine, {"ragged": keep})
    engine.submit(text.request("ragged", text.prompt(1, 20), 6), worker="local")
    assert driver.run()["ragged"] == text.expected(text.prompt(1, 20), 6, keep)
    assert not calls.sizes
    taps = Taps.at(range(LAYERS), last_rows(20))
    engine.submit(text.request("tapped", text.prompt(1, 20), 3), worker="local", taps=taps)
    assert Driver(engine).run()["tapped"] == text.expected(text.prompt(1, 20), 3)
    assert taps.scores(0).slots.tolist() == [19]
    assert calls.sizes == [1, 1], "decodes after the prompt"


def test_graphs_are_for_cuda_for_decoders_of_one_shape_and_can_be_turned_off(text) -> None:
    decoder = text.model.decoder.config
    assert recordable(decoder)
    assert not recordable(TextWorkshop(windows=(0, 6, 0)).model.decoder.config)
    assert replay_for(EngineConfig(), decoder, torch.device("cpu")) is None
    assert replay_for(EngineConfig(cuda_graphs=False), decoder, torch.device("cuda")) is None
    assert text.engine().pool.storage.shape[0] == text.engine().pool.groups


@pytest.mark.gpu
def test_on_a_gpu_replayed_steps_give_the_tokens_of_launched_ones() -> None:
    cuda = TextWorkshop(torch.device("cuda"))
    answers = []
    for on in (True, False):
        engine = cuda.engine(cuda_graphs=on)
        for number in range(5):
            engine.submit(cuda.request(f"s{number}", cuda.prompt(number, 20 + number), 30 - number), worker="local")
        answers.append(Driver(engine).run())
        graphs = engine._stepper._runner._graphs
        assert (graphs is not None) == on
        if graphs is not None:
            assert isinstance(graphs._replay, CudaReplay)
            assert len(graphs._replay._graphs) >= 3
    assert answers[0] == answers[1]
