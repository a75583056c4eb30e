"""What it costs to have a prompt's KV on a worker's device, in seconds, and the cheapest way to get it there; pure.

A prefix is used where it lies, restored from the worker's own tiers, or pulled from another worker; an image's embeddings
are found, pulled, or made again by the encoder; the rest is prefilled. :func:`plan_prompt` predicts each combination from
the bytes it moves, the measured rates of links and tiers and the fitted curve of prefill, and takes the cheapest.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from prismserve.kv_transfer.latency import PrefillCurve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prismserve.kv_transfer.index.mirror import PrefixMatch

FIRST_GUESS_LINK_BYTES_PER_S: Final = 1e9
"""Rate of a link nothing was sent over yet."""
FIRST_GUESS_TIER_BYTES_PER_S: Final[Mapping[str, float]] = {"host": 2e9, "disk": 5e8}
"""Rates of tiers nothing was read from yet; modest, so that the first restore is one that pays."""


class Way(enum.StrEnum):
    """How a part of a prompt comes to be where it is needed; the values are labels of a metric."""

    REUSE = "reuse"
    RESTORE = "restore"
    PULL = "pull"
    RECOMPUTE = "recompute"
    FIND_IMAGE = "find_image"
    PULL_IMAGE = "pull_image"
    ENCODE_IMAGE = "encode_image"
    COMPRESS_HARDER = "compress_harder"


@dataclass(frozen=True, slots=True)
class Overheads:
    """What each step takes beside its bytes and tokens, in seconds.

    Attributes:
        base_s: of any request, between the router and the first token.
        restore_s: of reading from tiers: a thread hop and a call between two engine steps.
        pull_s: of asking a peer: two calls, a lease and a manifest.
        handoff_s: of handing a prefill over to a decode worker, beside the bytes that come too late.
    """

    base_s: float = 0.001
    restore_s: float = 0.001
    pull_s: float = 0.004
    handoff_s: float = 0.003


@dataclass(frozen=True, slots=True)
class Rates:
    """What is known of the speed of workers and of the links between them. Whoever is not listed has the default.

    Attributes:
        curves: of prefill, by worker.
        curve: of prefill of a worker that is not listed.
        encode_token_s: seconds the vision encoder takes for one visual token before compression, by worker.
        encode_default_s: of an image, for a worker that is not listed.
        tiers: bytes per second of reading, by worker and tier.
        links: bytes per second by (source, target).
        overheads: see there.
    """

    curves: Mapping[str, PrefillCurve] = field(default_factory=dict)
    curve: PrefillCurve = field(default_factory=PrefillCurve)
    encode_token_s: Mapping[str, float] = field(default_factory=dict)
    encode_default_s: float = 0.0
    tiers: Mapping[tuple[str, str], float] = field(default_factory=dict)
    links: Mapping[tuple[str, str], float] = field(default_factory=dict)
    overheads: Overheads = field(default_factory=Overheads)

    def prefill_s(self, worker: str, cached_tokens: int, tokens: int) -> float:
        """Time of computing ``tokens`` behind ``cached_tokens``."""
        return self.curves.get(worker, self.curve).seconds(cached_tokens, tokens)

    def encode_s(self, worker: str, raw_tokens: int) -> float:
        """Time of encoding an image of ``raw_tokens`` visual tokens."""
        token_s = self.encode_token_s.get(worker)
        return self.encode_default_s if token_s is None else token_s * raw_tokens

    def read_s(self, worker: str, match: PrefixMatch, block_bytes: int) -> float:
        """Time of reading what ``match`` has in tiers; 0 if that is nothing."""
        parts = {"host": match.host_blocks, "disk": match.disk_blocks}
        return sum(
            blocks * block_bytes / (self.tiers.get((worker, name)) or FIRST_GUESS_TIER_BYTES_PER_S[name])
            for name, blocks in parts.items()
        )

    def link(self, source: str, target: str) -> float:
        """Bytes per second between two workers."""
        return self.links.get((source, target)) or FIRST_GUESS_LINK_BYTES_PER_S

    def send_s(self, source: str, target: str, nbytes: int) -> float:
        """Time of moving bytes between two workers."""
        return nbytes / self.link(source, target)


@dataclass(frozen=True, slots=True)
class ImageNeed:
    """One image or video of a prompt.

    Attributes:
        end_tokens: cache slots up to and including its last.
        raw_tokens: visual tokens before compression, all of which the encoder makes.
        nbytes: of its embeddings after compression.
    """

    end_tokens: int
    raw_tokens: int
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class PromptNeed:
    """What has to be on the device before the first token.

    Attributes:
        tokens: cache slots of the prompt.
        block_tokens: of a block.
        block_bytes: of a block over all layers, exact: caches are exchanged bit for bit.
        images: in order.
    """

    tokens: int
    block_tokens: int
    block_bytes: int = 0
    images: tuple[ImageNeed, ...] = ()

    def cached(self, blocks: int) -> int:
        """Tokens that ``blocks`` blocks spare; the last one is always computed, to sample from it."""
        return max(0, min(blocks * self.block_tokens, self.tokens - 1))


@dataclass(frozen=True, slots=True)
class Holder:
    """A peer that could send a prefix: what it has, and its name."""

    worker: str
    match: PrefixMatch


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """The cheapest way for one worker, with its predicted times in seconds.

    Attributes:
        cached_tokens: tokens that need not be computed.
        restore: whether the worker's own tiers are read.
        pull_from: the peer that sends blocks, or None.
        pull_blocks: leading blocks wanted of it, those that are here included.
        image_sources: per image, the peer that sends its embeddings, or "".
        fetch_s: restoring and pulling.
        encode_s: encoding images.
        prefill_s: computing the rest.
        ways: what is done, without repeats.
    """

    cached_tokens: int
    restore: bool
    pull_from: str | None
    pull_blocks: int
    image_sources: tuple[str, ...]
    fetch_s: float
    encode_s: float
    prefill_s: float
    ways: tuple[Way, ...]

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.fetch_s + self.encode_s + self.prefill_s


def plan_prompt(
    need: PromptNeed,
    worker: str,
    own: PrefixMatch,
    holders: Sequence[Holder],
    images: Sequence[Sequence[str]],
    rates: Rates,
    *,
    pull_blocks_min: int = 1,
) -> PromptPlan:
    """Choose how a worker gets a prompt ready; of equally fast ways the one that does least.

    Args:
        need: the prompt.
        worker: who needs it.
        own: what it holds itself, by tier.
        holders: peers it can be sent blocks by.
        images: per image, the workers that hold its embeddings and can send them; ``worker`` itself may be among them.
        rates: measured speeds.
        pull_blocks_min: blocks a peer must have beyond ours before it is asked.
    """
    sources = [None, *(holder for holder in holders if holder.worker != worker)]
    plans = (
        _plan(need, worker, own, source, images, rates, restore=restore)
        for restore in ((False, True) if own.blocks > own.ready_blocks else (False,))
        for source in sources
        if source is None or source.match.blocks - own.usable(restored=restore) >= pull_blocks_min
    )
    return min(plans, key=lambda plan: plan.total_s)


def exposed_s(nbytes: int, layers: int, compute_s: float, bytes_per_s: float) -> float:
    """Time a transfer goes on after the prefill it overlaps with: layers leave as they become final.

    The last layer's bytes can only follow its computation; if sending is slower than computing, what has piled up
    follows too.

    Args:
        nbytes: of all layers, as encoded.
        layers: of the model.
        compute_s: of the whole prefill.
        bytes_per_s: of the link.
    """
    send_s = nbytes / bytes_per_s
    return max(send_s / layers, send_s - compute_s * (layers - 1) / layers)


def _plan(
    need: PromptNeed,
    worker: str,
    own: PrefixMatch,
    source: Holder | None,
    images: Sequence[Sequence[str]],
    rates: Rates,
    *,
    restore: bool,
) -> PromptPlan:
    here = own.usable(restored=restore)
    blocks = here if source is None else source.match.blocks
    cached = need.cached(blocks)
    ways = [Way.REUSE] if own.ready_blocks else []
    fetch_s = pull_s = 0.0
    if restore:
        ways.append(Way.RESTORE)
        fetch_s = rates.overheads.restore_s + rates.read_s(worker, own, need.block_bytes)
    if source is not None:
        ways.append(Way.PULL)
        missing_bytes = (blocks - here) * need.block_bytes
        pull_s = rates.overheads.pull_s + rates.send_s(source.worker, worker, missing_bytes)
        pull_s += rates.read_s(source.worker, source.match, need.block_bytes)
    chosen: list[str] = []
    encode_s = image_pull_s = 0.0
    for image, known in zip(need.images, images, strict=True):
        name, pulled_s, encoded_s = "", 0.0, 0.0
        if image.end_tokens > cached:
            name, pulled_s, encoded_s = _image(image, worker, known, rates)
            ways.append(Way.PULL_IMAGE if name else Way.ENCODE_IMAGE if worker not in known else Way.FIND_IMAGE)
        chosen.append(name)
        image_pull_s += pulled_s
        encode_s += encoded_s
    prefill_s = rates.prefill_s(worker, cached, need.tokens - cached)
    # Blocks and embeddings are pulled at the same time.
    fetch_s += max(pull_s, image_pull_s)
    ways.append(Way.RECOMPUTE)
    return PromptPlan(
        cached_tokens=cached,
        restore=restore,
        pull_from=None if source is None else source.worker,
        pull_blocks=0 if source is None else blocks,
        image_sources=tuple(chosen),
        fetch_s=fetch_s,
        encode_s=encode_s,
        prefill_s=prefill_s,
        ways=tuple(dict.fromkeys(ways)),
    )


def _image(image: ImageNeed, worker: str, known: Sequence[str], rates: Rates) -> tuple[str, float, float]:
    """For an image that is needed: who sends its embeddings ("" for nobody), and seconds of pulling and encoding."""
    if worker in known:
        return "", 0.0, 0.0
    encode_s = rates.encode_s(worker, image.raw_tokens)
    pulls = [(rates.overheads.pull_s + rates.send_s(name, worker, image.nbytes), name) for name in known]
    if pulls and min(pulls)[0] < encode_s:
        pull_s, name = min(pulls)
        return name, pull_s, 0.0
    return "", 0.0, encode_s
