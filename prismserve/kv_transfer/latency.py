"""How long a prefill takes: a curve in the number of tokens, fitted online to the times that were observed; pure.

A chunk of ``n`` tokens behind ``c`` cached ones passes ``n`` tokens through every matrix product and compares
``n * (c + n / 2)`` pairs in attention, so its time is ``fixed + token * n + pair * n * (c + n / 2)``. The three
coefficients are those of least squares over relative errors, with old observations fading, and held by a weak prior where
the observations do not tell them apart (recursive least squares with forgetting: Ljung, System Identification, 11.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

FIRST_GUESS_TOKENS_PER_S: Final = 2000.0
"""Speed of a prefill where nothing was observed yet."""
_FADE: Final = 0.98
_HOLD: Final = 0.005
"""Weight of the prior, in observations."""
_FIXED_SCALE_S: Final = 0.005
_PAIR_SCALE_TOKENS: Final = 4096.0
"""So many tokens of context are expected to double what a token costs."""
_TYPICAL_TOKENS: Final = 256
_SHORTEST_S: Final = 1e-5
_TERMS: Final = 3


@dataclass(frozen=True, slots=True)
class PrefillCurve:
    """Seconds of a prefill.

    Attributes:
        fixed_s: of every prefill.
        token_s: of every token computed.
        pair_s: of every pair of a computed token and one it attends to.
    """

    fixed_s: float = 0.0
    token_s: float = 1.0 / FIRST_GUESS_TOKENS_PER_S
    pair_s: float = 0.0

    def seconds(self, cached_tokens: int, tokens: int) -> float:
        """Predicted time of computing ``tokens`` tokens behind ``cached_tokens``; 0 for none."""
        if tokens <= 0:
            return 0.0
        return self.fixed_s + self.token_s * tokens + self.pair_s * _pairs(cached_tokens, tokens)


@dataclass(slots=True)
class Average:
    """An exponentially weighted mean that starts at its first value.

    Attributes:
        value: the mean; 0 before the first value.
        samples: how many values were taken in.
    """

    value: float = 0.0
    samples: int = 0

    def add(self, value: float, weight: float = 0.1) -> None:
        """Take in a value, with this weight once the mean is older than its inverse."""
        self.samples += 1
        self.value += max(weight, 1.0 / self.samples) * (value - self.value)


class CurveFit:
    """The curve that fits the prefills of one worker, or of many.

    Attributes:
        samples: prefills observed.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._matrix = [[0.0] * _TERMS for _ in range(_TERMS)]
        self._vector = [0.0] * _TERMS

    def observe(self, cached_tokens: int, tokens: int, seconds: float) -> None:
        """Learn from one prefill; one of no tokens or no time says nothing."""
        if tokens <= 0 or seconds < _SHORTEST_S:
            return
        self.samples += 1
        # Divided by the time, so that a long prefill does not drown ten short ones.
        row = [1.0 / seconds, tokens / seconds, _pairs(cached_tokens, tokens) / seconds]
        for i in range(_TERMS):
            self._vector[i] = _FADE * self._vector[i] + row[i]
            for j in range(_TERMS):
                self._matrix[i][j] = _FADE * self._matrix[i][j] + row[i] * row[j]

    def curve(self, prior: PrefillCurve | None = None) -> PrefillCurve:
        """The curve as it is now.

        Args:
            prior: what is assumed without observations, and where they leave a choice.
        """
        assumed = PrefillCurve() if prior is None else prior
        if not self.samples:
            return assumed
        start = (assumed.fixed_s, assumed.token_s, assumed.pair_s)
        # Not its ``token_s``: a curve may have none, and what all coefficients are measured by must be above 0.
        token_s = max(assumed.seconds(0, _TYPICAL_TOKENS) / _TYPICAL_TOKENS, _SHORTEST_S / _TYPICAL_TOKENS)
        scales = (_FIXED_SCALE_S, token_s, token_s / _PAIR_SCALE_TOKENS)
        matrix = [list(row) for row in self._matrix]
        vector = list(self._vector)
        for i in range(_TERMS):
            hold = _HOLD / scales[i] ** 2
            matrix[i][i] += hold
            vector[i] += hold * start[i]
        return PrefillCurve(*_solve_positive(matrix, vector))


def _pairs(cached_tokens: int, tokens: int) -> float:
    return tokens * (cached_tokens + tokens / 2)


def _solve_positive(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    """Solve a positive definite system; terms that come out negative are left out one by one."""
    used = list(range(len(vector)))
    while True:
        solution = _solve([[matrix[i][j] for j in used] for i in used], [vector[i] for i in used])
        lowest = min(range(len(used)), key=lambda place: solution[place] / _magnitude(matrix, used[place]))
        if solution[lowest] >= 0.0 or len(used) == 1:
            break
        del used[lowest]
    found = [0.0] * len(vector)
    for term, value in zip(used, solution, strict=True):
        found[term] = max(0.0, value)
    return found


def _magnitude(matrix: Sequence[Sequence[float]], term: int) -> float:
    """The unit in which a coefficient is compared with others."""
    return float(matrix[term][term] ** -0.5)


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float]:
    """Gaussian elimination, scaled so that coefficients of very different size do no harm."""
    size = len(vector)
    scale = [_magnitude(matrix, i) for i in range(size)]
    rows = [[matrix[i][j] * scale[i] * scale[j] for j in range(size)] + [vector[i] * scale[i]] for i in range(size)]
    for i in range(size):
        for k in range(i + 1, size):
            factor = rows[k][i] / rows[i][i]
            for j in range(i, size + 1):
                rows[k][j] -= factor * rows[i][j]
    found = [0.0] * size
    for i in reversed(range(size)):
        rest = sum(rows[i][j] * found[j] for j in range(i + 1, size))
        found[i] = (rows[i][size] - rest) / rows[i][i]
    return [value * unit for value, unit in zip(found, scale, strict=True)]
