"""How far predictions of a duration were off lately: quantiles of measured over predicted time; pure."""

from __future__ import annotations

from collections import deque
from typing import Final

_SAMPLES_MAX: Final = 64
_SHORTEST_S: Final = 1e-6


class Calibration:
    """The last ratios of measured to predicted time.

    A quantile rather than a mean: what is decided by it shall be right nearly always, not on average.
    """

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_SAMPLES_MAX)

    def __len__(self) -> int:
        """Samples held."""
        return len(self._ratios)

    def add(self, predicted_s: float, measured_s: float) -> None:
        """Take in one outcome."""
        self._ratios.append(measured_s / max(predicted_s, _SHORTEST_S))

    def forget(self) -> None:
        """Drop the oldest sample, so that a bad time is not held against predictions for ever."""
        if self._ratios:
            self._ratios.popleft()

    def quantile(self, share: float) -> float:
        """The ratio below which this share of the samples lies, by nearest rank; 1 without samples."""
        if not self._ratios:
            return 1.0
        ordered = sorted(self._ratios)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
