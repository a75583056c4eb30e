"""What makes a worker a decode worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.decode_workers.landing import Landing
from prismserve.protocol import worker_pb2 as pb

if TYPE_CHECKING:
    from prismserve.worker_runtime.runtime import WorkerRuntime


def attach(runtime: WorkerRuntime) -> None:
    """Give a worker the decode job and the receiving half of handoffs."""
    landing = Landing(runtime)
    runtime.landing = landing
    runtime.add_handler(pb.JOB_DECODE, landing)
