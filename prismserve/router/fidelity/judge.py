"""Which presets are in force: pure bookkeeping over comparisons, with the clock passed in.

A preset that was stepped back is replaced by the next milder one that was not: turbo, balanced, quality, off. It is not
served any more, so its evidence comes from replays of requests that asked for it; hysteresis is in three places: it stays
back for a while, it must do clearly better than its bound, and it is judged by fresh comparisons only.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from prismserve.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismserve.router.fidelity.compare import Comparison
    from prismserve.router.fidelity.config import FidelityConfig

CHAIN: Final = ("turbo", "balanced", "quality")
"""Presets that can step back, strongest first; behind the last one is ``off``."""
EXACT: Final = "off"
_CONFIDENCE: Final = 1.645
"""Normal quantile of a one-sided confidence of 95 %."""


class Control(enum.StrEnum):
    """Who decides about a preset."""

    AUTO = "auto"
    """The guard."""
    HOLD = "hold"
    """An operator keeps it back."""
    RELEASE = "release"
    """An operator keeps it in force."""


@dataclass(slots=True)
class _Preset:
    """State of one preset; ``window`` holds (agreed, KL in nats) of its latest comparisons."""

    bound: float
    window: deque[tuple[bool, float]]
    control: Control = Control.AUTO
    stepped_back: bool = False
    since_s: float = 0.0
    reason: str = ""
    steps: int = 0
    comparisons: int = field(default=0)

    @property
    def held(self) -> bool:
        """Whether another one is served in its place."""
        return self.control is Control.HOLD or (self.stepped_back and self.control is Control.AUTO)

    def disagreement(self) -> tuple[int, int]:
        """Comparisons of the window that disagreed, and all of them."""
        return sum(not agreed for agreed, _ in self.window), len(self.window)

    def kl_nats(self) -> float:
        """Mean over the window."""
        return math.fsum(kl for _, kl in self.window) / len(self.window) if self.window else 0.0


class Judge:
    """Decides which presets are in force.

    Args:
        config: bounds and patience.
        clock: seconds, monotonic.
    """

    def __init__(self, config: FidelityConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        bounds = {
            "turbo": config.turbo_disagreement_max,
            "balanced": config.balanced_disagreement_max,
            "quality": config.quality_disagreement_max,
        }
        self._presets = {name: _Preset(bounds[name], deque(maxlen=config.window)) for name in CHAIN}

    def in_force(self, preset: str) -> str:
        """What is served to a request that asks for ``preset``; names that are not in the chain stand for themselves."""
        if preset not in self._presets:
            return preset
        chain = CHAIN[CHAIN.index(preset) :]
        return next((name for name in chain if not self._presets[name].held), EXACT)

    def probe(self, preset: str) -> str | None:
        """The preset that was stepped back last on the way from ``preset`` to what is in force: it may come back next.

        None where nothing was, or where an operator keeps it back.
        """
        served = self.in_force(preset)
        if served == preset:
            return None
        last = CHAIN.index(served) if served in CHAIN else len(CHAIN)
        candidate = CHAIN[last - 1]
        return candidate if self._presets[candidate].control is Control.AUTO else None

    def record(self, preset: str, comparison: Comparison) -> str | None:
        """Take in a comparison of what ``preset`` stands for; returns ``back`` or ``forth`` if that changed what is in force."""
        entry = self._presets.get(preset)
        if entry is None:
            return None
        entry.window.append((comparison.agreed, comparison.kl_nats))
        entry.comparisons += 1
        if not self._config.step_back or entry.control is not Control.AUTO:
            return None
        if len(entry.window) < min(self._config.samples_min, self._config.window):
            return None
        reason = self._recovery(entry) if entry.stepped_back else self._failure(entry)
        if not reason:
            return None
        self._turn(entry, back=not entry.stepped_back, reason=reason)
        return "back" if entry.stepped_back else "forth"

    def control(self, preset: str, control: Control) -> None:
        """An operator's word; ``auto`` starts again with the preset in force and no evidence.

        Raises:
            InvalidRequestError: no preset of this name can step back.
        """
        entry = self._presets.get(preset)
        if entry is None:
            message = f"preset: {preset[:32]!r} cannot step back; those that can: {', '.join(CHAIN)}"
            raise InvalidRequestError(message, field="preset")
        entry.control = control
        self._turn(entry, back=False, reason="" if control is Control.AUTO else f"operator: {control}")

    def status(self) -> dict[str, Any]:
        """Every preset of the chain, for the status document."""
        return {name: self._entry(name, entry) for name, entry in self._presets.items()}

    def _entry(self, name: str, entry: _Preset) -> dict[str, Any]:
        disagreed, compared = entry.disagreement()
        return {
            "in_force": self.in_force(name),
            "held": entry.held,
            "control": entry.control.value,
            "since_s": round(self._clock() - entry.since_s, 3) if entry.reason else None,
            "reason": entry.reason,
            "steps": entry.steps,
            "disagreement_max": entry.bound,
            "disagreed": disagreed,
            "compared": compared,
            "comparisons": entry.comparisons,
            "kl_nats": round(entry.kl_nats(), 6),
        }

    def _turn(self, entry: _Preset, *, back: bool, reason: str) -> None:
        entry.stepped_back = back
        entry.since_s = self._clock()
        entry.reason = reason
        entry.steps += back
        entry.window.clear()

    def _failure(self, entry: _Preset) -> str:
        """Why a preset in force must step back; empty if it need not."""
        disagreed, compared = entry.disagreement()
        # The lower end of the interval: a few unlucky answers must not decide.
        if lower_share(disagreed, compared) > entry.bound:
            return f"{disagreed} of {compared} answers differ, the bound is {entry.bound:g}"
        limit = self._config.kl_max_nats
        if limit is not None and entry.kl_nats() > limit:
            return f"the mean divergence is {entry.kl_nats():.3g} nats, the bound is {limit:g}"
        return ""

    def _recovery(self, entry: _Preset) -> str:
        """Why a preset may come back; empty if it may not yet."""
        config = self._config
        disagreed, compared = entry.disagreement()
        limit = config.kl_max_nats
        rested = self._clock() - entry.since_s >= config.recover_after_s
        agrees = disagreed <= config.recover_share * entry.bound * compared
        near = limit is None or entry.kl_nats() <= config.recover_share * limit
        return f"{disagreed} of {compared} replays differ" if rested and agrees and near else ""


def read_control(value: Any) -> Control:
    """What an operator asked for; InvalidRequestError if it is none of the three words."""
    words = tuple(item.value for item in Control)
    if value not in words:
        message = f"control: must be one of {', '.join(words)}"
        raise InvalidRequestError(message, field="control")
    return Control(value)


def lower_share(hits: int, trials: int) -> float:
    """Lower end of the one-sided 95 % Wilson interval of a share; 0 without trials."""
    if not trials:
        return 0.0
    share, z2 = hits / trials, _CONFIDENCE**2
    middle = share + z2 / (2 * trials)
    spread = _CONFIDENCE * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, (middle - spread) / (1 + z2 / trials))
