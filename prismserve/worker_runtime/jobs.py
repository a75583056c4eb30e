"""What routers ask of a worker, and what the role rooms implement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from prismserve.core.errors import outcome_text
from prismserve.core.types import FinishReason, TokenOutput
from prismserve.protocol import convert
from prismserve.protocol import worker_pb2 as pb

if TYPE_CHECKING:
    from prismserve.core.errors import PrismServeError
    from prismserve.core.types import Request
    from prismserve.worker_runtime.sessions import RequestRef


@dataclass(frozen=True, slots=True)
class Submission:
    """One placed request, with the router's hints."""

    request: Request
    job: int
    target_worker: str
    target_epoch: int
    pull_from: str
    pull_blocks: int
    embedding_holders: tuple[str, ...]
    skip_restore: bool = False

    @property
    def ref(self) -> RequestRef:
        """Request id and attempt."""
        return self.request.request_id, self.request.attempt


def submission_from_proto(message: pb.Submit) -> Submission:
    """Read a submission; TransferError if it is malformed."""
    return Submission(
        request=convert.request_from_proto(message.request),
        job=message.job,
        target_worker=message.target_worker,
        target_epoch=message.target_epoch,
        pull_from=message.pull_from,
        pull_blocks=message.pull_blocks,
        embedding_holders=tuple(message.embedding_holders),
        skip_restore=message.skip_restore,
    )


def failure(ref: RequestRef, error: PrismServeError) -> TokenOutput:
    """The output that reports a failed job."""
    return TokenOutput(ref[0], ref[1], (), FinishReason.ERROR, outcome_text(error))


class JobHandler(Protocol):
    """Carries out one kind of job."""

    async def submit(self, submission: Submission) -> None:
        """Begin the job; results go out through the sessions. Raises PrismServeError when it cannot begin."""
        ...

    async def cancel(self, ref: RequestRef) -> None:
        """Stop the job and release what it holds; unknown ones are ignored."""
        ...


class LandingHandler(Protocol):
    """The receiving half of a handoff."""

    async def reserve(self, message: pb.ReserveRequest) -> pb.ReserveReply:
        """Grant room, or say why not."""
        ...

    async def commit(self, message: pb.CommitRequest) -> pb.CommitReply:
        """Verify and start decoding, or say why not."""
        ...
