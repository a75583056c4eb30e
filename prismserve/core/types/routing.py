"""What a router decides, and what it expects of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoutePrediction:
    """What placement expected of its choice, in seconds; the whole is the time from there to the first token.

    Attributes:
        base_s: beside everything else.
        queue_s: behind other requests.
        fetch_s: restoring and pulling.
        encode_s: encoding images.
        prefill_s: computing the prompt.
        transfer_s: bytes that reach the decode worker after the prefill has ended.
        handoff_s: of a handoff, beside the bytes.
        other_s: the whole of the best choice of the other kind (local or disaggregated); 0 if there was none.
        ways: how each part of the prompt gets to the worker.
        idle: whether the chosen workers had no other request.
    """

    base_s: float = 0.0
    queue_s: float = 0.0
    fetch_s: float = 0.0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    handoff_s: float = 0.0
    other_s: float = 0.0
    ways: tuple[str, ...] = ()
    idle: bool = False

    @property
    def total_s(self) -> float:
        """The whole."""
        parts = (self.queue_s, self.fetch_s, self.encode_s, self.prefill_s, self.transfer_s, self.handoff_s)
        return self.base_s + sum(parts)


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """Where a request goes, and why.

    ``prefill_worker`` None means the decode worker prefills locally. ``pull_from`` names a worker that holds
    ``pull_blocks`` leading blocks the prefill worker lacks. ``embedding_holders`` gives, per image, a worker that
    holds its embeddings, or "". ``restore`` False tells it not to read its own tiers, because something else is faster.
    ``compress_harder`` sends the KV under the codec the request allows for that.
    """

    decode_worker: str
    prefill_worker: str | None
    reason: str
    pull_from: str | None = None
    pull_blocks: int = 0
    embedding_holders: tuple[str, ...] = ()
    restore: bool = True
    compress_harder: bool = False
    prediction: RoutePrediction | None = None
