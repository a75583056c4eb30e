"""Several answers to one request: ``n`` generations over one prompt, merged into one stream of events.

The first choice is placed like any request. The others follow once its first token has arrived, at the same decode
worker: by then that worker holds the prompt's KV, so the prompt is computed and moved once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from typing import TYPE_CHECKING, Final

from prismserve.core.hashing import digest
from prismserve.router.generation import Finished, TextDelta
from prismserve.router.usage import combine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from prismserve.router.generation import GenerationEvent
    from prismserve.router.requests import Prepared
    from prismserve.router.usage import Usage

    Run = Callable[[Prepared, str | None], AsyncGenerator[GenerationEvent, None]]

_SEED_BYTES: Final = 8


def sibling(prepared: Prepared, index: int) -> Prepared:
    """The request of choice ``index``: another id and another random stream, all else equal; choice 0 is itself."""
    if index == 0:
        return prepared
    request = prepared.request
    state = digest("choice", str(request.sampling.seed).encode(), str(index).encode())
    seed = int.from_bytes(state[:_SEED_BYTES], "big") >> 1
    sampling = dataclasses.replace(request.sampling, seed=seed)
    return dataclasses.replace(
        prepared, request=dataclasses.replace(request, request_id=uuid.uuid4().hex, sampling=sampling)
    )


async def run_choices(run: Run, prepared: Prepared, choices: int) -> AsyncGenerator[GenerationEvent, None]:
    """Yield the events of all choices as they come, each with its index; closing the iterator cancels them all.

    Args:
        run: starts one generation near a worker, or anywhere.
        prepared: the request.
        choices: at least 1.

    Yields:
        Per choice what ``run`` yields; only the very last ``Finished`` carries the usage, of all choices together.

    Raises:
        PrismServeError: of the first choice that fails; the others are cancelled.
    """
    streams: list[AsyncGenerator[GenerationEvent, None]] = []
    pending: dict[asyncio.Task[GenerationEvent | None], int] = {}
    usages: dict[int, Usage] = {}

    def begin(index: int, near: str | None) -> None:
        streams.append(run(sibling(prepared, index), near))
        pending[asyncio.create_task(_next(streams[index]))] = index

    begin(0, None)
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task, index in sorted(((task, pending.pop(task)) for task in done), key=lambda item: item[1]):
                event = task.result()
                if event is None:
                    continue
                if len(streams) == 1 and isinstance(event, TextDelta):
                    for other in range(1, choices):
                        begin(other, event.decode_worker)
                pending[asyncio.create_task(_next(streams[index]))] = index
                if isinstance(event, Finished) and event.usage is not None:
                    usages[index] = event.usage
                    complete = len(usages) == choices
                    usage = combine([usages[at] for at in sorted(usages)]) if complete else None
                    event = dataclasses.replace(event, usage=usage)
                yield dataclasses.replace(event, index=index)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await asyncio.gather(*(stream.aclose() for stream in streams), return_exceptions=True)


async def _next(events: AsyncGenerator[GenerationEvent, None]) -> GenerationEvent | None:
    return await anext(events, None)
