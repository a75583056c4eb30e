from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from prismserve.core.errors import EngineError
from prismserve.core.types import FinishReason, Prompt, Request, SamplingParams, TextSegment
from prismserve.router.choices import run_choices, sibling
from prismserve.router.generation import Finished, TextDelta
from prismserve.router.requests import Prepared
from tests.router.test_usage import usage


def prepared():
    request = Request("r", 0, b"n" * 32, b"n" * 32, Prompt((TextSegment((1,)),)), (), SamplingParams(seed=5), None)
    return Prepared(request, (), ())


@dataclass
class Runs:
    """Starts generations that say their number, and keeps what became of them."""

    started: list = field(default_factory=list)
    closed: list = field(default_factory=list)
    fail: int | None = None
    hang: bool = False

    async def __call__(self, made, near):
        number = len(self.started)
        self.started.append(SimpleNamespace(near=near, request=made.request))
        try:
            for step in range(3):
                await asyncio.sleep(0.001)
                if number == self.fail and step == 1:
                    message = "broken"
                    raise EngineError(message)
                yield TextDelta(f"{number}.{step} ", (number,), (), "decode-7")
            if self.hang and number:
                await asyncio.Event().wait()
            yield Finished(FinishReason.STOP, usage(completion_tokens=3))
        finally:
            self.closed.append(number)


async def gather(runs, choices):
    async with contextlib.aclosing(run_choices(runs, prepared(), choices)) as events:
        return [event async for event in events]


@pytest.mark.parametrize("choices", [1, 2, 5])
async def test_every_choice_is_whole_and_only_the_last_end_has_the_usage(choices):
    runs = Runs()
    events = await gather(runs, choices)
    for index in range(choices):
        text = "".join(e.text for e in events if isinstance(e, TextDelta) and e.index == index)
        assert text == f"{index}.0 {index}.1 {index}.2 "
    ends = [e for e in events if isinstance(e, Finished)]
    assert sorted(e.index for e in ends) == list(range(choices))
    assert [e.usage is not None for e in ends] == [False] * (choices - 1) + [True]
    assert events[-1].usage.completion_tokens == 3 * choices
    assert events[-1].usage.prompt_tokens == usage().prompt_tokens


async def test_others_begin_after_the_first_token_beside_the_first_and_interleave():
    runs = Runs()
    events = await gather(runs, 3)
    assert [run.near for run in runs.started] == [None, "decode-7", "decode-7"]
    assert events[0].index == 0
    indexes = [event.index for event in events]
    assert indexes != sorted(indexes)


async def test_choices_differ_in_id_and_seed_alone_and_the_seeds_are_reproducible():
    made = [sibling(prepared(), index).request for index in range(4)]
    assert made[0] == prepared().request
    assert len({request.request_id for request in made}) == 4
    assert len({request.sampling.seed for request in made}) == 4
    assert all(0 <= request.sampling.seed < 2**63 for request in made)
    assert [sibling(prepared(), index).request.sampling for index in range(4)] == [r.sampling for r in made]


@pytest.mark.parametrize("fail", [0, 2])
async def test_a_failure_ends_all_choices(fail):
    runs = Runs(fail=fail)
    with pytest.raises(EngineError, match="broken"):
        await gather(runs, 4)
    assert sorted(runs.closed) == list(range(len(runs.started)))


async def test_closing_early_ends_all_choices():
    runs = Runs(hang=True)
    events = run_choices(runs, prepared(), 3)
    async for event in events:
        if isinstance(event, Finished):
            break
    await events.aclose()
    assert sorted(runs.closed) == [0, 1, 2]
