"""A worker process for tests: obeys pickled commands on standard input. Run by path, by ``conftest.Peer``."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from prismserve.core.errors import PrismServeError  # noqa: E402
from prismserve.kv_transfer.arena import Arena  # noqa: E402
from prismserve.kv_transfer.config import TransferConfig  # noqa: E402
from prismserve.kv_transfer.hub import TransportHub  # noqa: E402
from prismserve.kv_transfer.receiver import Receiver  # noqa: E402
from prismserve.kv_transfer.sender import Outgoing  # noqa: E402

_found = importlib.util.spec_from_file_location("kv_transfer_conftest", Path(__file__).with_name("conftest.py"))
common: Any = importlib.util.module_from_spec(_found)
sys.modules["kv_transfer_conftest"] = common
_found.loader.exec_module(common)


def got(worker: Any) -> Any:
    answer = {key: (k.numpy(), v.numpy()) for key, (k, v) in worker.got.items()}
    worker.got.clear()
    return answer


def commit(worker: Any, *arguments: Any) -> Any:
    return worker.receiver.commit(*arguments).result(10)


def send(worker: Any, target: Any, reservation: Any, codec: Any, seed: int, tokens: int, complete: bool) -> Any:
    outgoing = Outgoing(worker.hub, target, reservation, codec, common.LAYOUT)
    common.push_all(outgoing, seed, tokens)
    if complete:
        return outgoing.finish(10), outgoing.transport
    common.until(lambda: outgoing.bytes_sent > 0)
    return None


COMMANDS: dict[str, Callable[..., Any]] = {
    "info": lambda worker: worker.info,
    "reserve": lambda worker, *arguments: worker.reserve(*arguments),
    "commit": commit,
    "got": got,
    "used": lambda worker: (worker.arena.used_pages, worker.arena.used_staging_pages),
    "send": send,
}


def main() -> None:
    torch.set_num_threads(1)
    commands, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print must not disturb the answers
    config = TransferConfig.model_validate_json(sys.argv[2])
    arena = Arena(config)
    hub = TransportHub(sys.argv[1], arena, config)
    worker = common.Worker(arena, hub, Receiver(hub, common.LAYOUT))
    while True:
        try:
            command, arguments = pickle.load(commands)
        except EOFError:
            break
        try:
            answer = COMMANDS[command](worker, *arguments)
        except PrismServeError as error:
            answer = type(error)(error.message)
        pickle.dump(answer, answers)
        answers.flush()
    worker.close()


if __name__ == "__main__":
    main()
