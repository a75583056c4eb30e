"""The engine on a GPU: quantised pools and recorded decode steps beside the same on the CPU."""

from __future__ import annotations

import pytest
import torch

from prismserve.engine.taps import Taps, last_rows
from tests.engine.rounding import QUANTISED
from tests.engine.small_text import HEADS, Driver, TextWorkshop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPT = 41
STEP = {"fp8": 0.07, "int8": 0.02, "int4": 0.15}
"""Largest difference, as a part of a row's greatest magnitude, that a number on the edge of two codes may make."""


@pytest.fixture(scope="module")
def workshops() -> tuple[TextWorkshop, TextWorkshop]:
    pytest.importorskip("triton")
    return TextWorkshop(), TextWorkshop(torch.device("cuda"))


@pytest.mark.parametrize("kv", QUANTISED)
@pytest.mark.parametrize("step_tokens", [7, 512])
def test_a_quantised_pool_holds_what_it_holds_on_a_cpu(workshops, kv, step_tokens) -> None:
    held = []
    for text in workshops:
        engine = text.engine(kv_cache_dtype=kv, max_step_tokens=step_tokens)
        engine.submit(text.request("a", text.prompt(1, PROMPT), 4), worker="local")
        for _ in range(-(-PROMPT // step_tokens)):
            engine.step()
        held.append([side[:PROMPT].float().cpu() for side in engine.read_layer("a", 0, 0)])
        assert len(Driver(engine).run()["a"]) + 1 == 4
    for cpu, cuda in zip(*held, strict=True):
        bound = STEP[kv] * cpu.abs().amax(-1, keepdim=True)
        assert bool(((cpu - cuda).abs() <= bound + 1e-3).all())


@pytest.mark.parametrize("kv", ["auto", *QUANTISED])
def test_swapped_sequences_finish(workshops, kv) -> None:
    text = workshops[1]
    engine = text.engine(30, kv_cache_dtype=kv, preemption="swap", max_step_tokens=24)
    for number in range(4):
        engine.submit(text.request(f"s{number}", text.prompt(number, 30), 40), worker="local")
    driver = Driver(engine)
    assert {name: len(tokens) for name, tokens in driver.run().items()} == {f"s{n}": 40 for n in range(4)}
    assert driver.all_finished()
    assert engine._stepper.counters.swaps > 0


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_taps_are_those_of_a_cpu(workshops, kv) -> None:
    found = []
    for text in workshops:
        taps = Taps.at((0,), last_rows(PROMPT, 3), received=range(PROMPT), summed=range(PROMPT))
        engine = text.engine(kv_cache_dtype=kv, max_step_tokens=16)
        engine.submit(text.request("t", text.prompt(1, PROMPT), 2), worker="local", taps=taps)
        Driver(engine).run()
        kinds = (taps.scores(0).probabilities, taps.received_sums(0).sums, taps.summed_scores(0).sums)
        found.append([part.cpu() for part in kinds])
    for cpu, cuda in zip(*found, strict=True):
        assert cpu.shape[-2:] == (HEADS, PROMPT)
        torch.testing.assert_close(cuda, cpu, rtol=1e-2, atol=1e-2)
