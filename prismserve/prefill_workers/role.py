"""What makes a worker a prefill worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.prefill_workers.push import PrefillJobs
from prismserve.protocol import worker_pb2 as pb

if TYPE_CHECKING:
    from prismserve.worker_runtime.runtime import WorkerRuntime


def attach(runtime: WorkerRuntime) -> None:
    """Give a worker the prefill job."""
    runtime.add_handler(pb.JOB_PREFILL, PrefillJobs(runtime))
