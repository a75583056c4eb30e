"""A worker process for tests, without Ray: obeys JSON commands on standard input, ends with it. Run by path."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from prismserve.core.heap import settle
from prismserve.core.types import Role
from prismserve.decode_workers.role import attach as attach_decode
from prismserve.kv_transfer import landing as transfer_landing
from prismserve.kv_transfer.sender import Outgoing
from prismserve.prefill_workers.role import attach as attach_prefill
from prismserve.worker_runtime.config import WorkerConfig
from prismserve.worker_runtime.runtime import WorkerRuntime

ATTACH = {
    Role.PREFILL: (attach_prefill,),
    Role.DECODE: (attach_decode,),
    Role.MIXED: (attach_prefill, attach_decode),
}


class Fault:
    """Sends this process a signal when a chosen layer is handed on; of all workers with one ticket, the first alone."""

    def __init__(self) -> None:
        self.signal = 0
        self.layer = -1
        self.ticket = ""

    def arm(self, name: str, layer: int, ticket: str) -> None:
        self.signal, self.layer, self.ticket = getattr(signal, name), layer, ticket

    def at(self, layer: int) -> None:
        if not self.signal or layer != self.layer:
            return
        number, self.signal = self.signal, 0
        try:
            os.close(os.open(self.ticket, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), number)


def install(fault: Fault) -> None:
    """A prefill worker meets the fault when it pushes the layer, a decode worker when it takes it over."""
    push, deliver = Outgoing.push_from, transfer_landing.Landing._deliver

    def push_from(self: Any, layer: int, *arguments: Any, **more: Any) -> None:
        push(self, layer, *arguments, **more)
        fault.at(layer)

    def take(self: Any, payload: Any, data: Any) -> None:
        fault.at(payload.layer)
        deliver(self, payload, data)

    Outgoing.push_from = push_from
    transfer_landing.Landing._deliver = take


async def state(runtime: WorkerRuntime) -> dict[str, Any]:
    # Raises, and so ends the process, if blocks were lost.
    await runtime.on_engine(lambda engine: engine.check_integrity())
    stats, receiver = runtime.stats(), runtime.receiver.stats
    return {
        "whole": True,
        "epoch": runtime.info.epoch,
        "running": stats.running,
        "waiting": stats.waiting,
        "requests": runtime.sessions.requests,
        "blocks_used": stats.kv_blocks_used,
        "pages": runtime.hub.arena.used_pages,
        "staging": runtime.hub.arena.used_staging_pages,
        "leases": receiver.leases_open,
        "landing": 0 if runtime.landing is None else runtime.landing.waiting,
        "prefill_tokens": stats.prefill_tokens,
        "decode_tokens": stats.decode_tokens,
        "step_ms": stats.step_ms,
    }


async def main() -> None:
    runtime = WorkerRuntime(WorkerConfig.model_validate_json(sys.argv[1]), lambda *_: None)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not disturb the answers
    fault = Fault()
    install(fault)
    await runtime.load()
    for attach in ATTACH[runtime.config.role]:
        attach(runtime)
    await runtime.serve()
    settle()
    say(answers, {"worker_id": runtime.info.worker_id, "pid": os.getpid()})
    commands: dict[str, Callable[..., Any]] = {"state": state}
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        name = order.pop("command")
        if name == "arm":
            fault.arm(**order)
            say(answers, {})
        else:
            say(answers, await commands[name](runtime))
    await runtime.stop()


def say(answers: Any, document: dict[str, Any]) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()


if __name__ == "__main__":
    asyncio.run(main())
