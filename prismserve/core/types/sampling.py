"""How tokens are chosen: sampling parameters and constraints."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ConstraintKind(enum.StrEnum):
    """How a constraint on the answer is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the whole answer must be.

    Attributes:
        kind: how ``text`` is written.
        text: a JSON schema as JSON, a regular expression, a JSON array of strings, or a grammar (Lark, GBNF, EBNF).
    """

    kind: ConstraintKind
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    ``temperature`` 0 is greedy. ``top_k`` 0 is off. ``seed`` None draws one per request at the router, so that
    a migrated request goes on with the same random stream: token i is drawn from (seed, i).

    ``logit_bias`` holds (token id, what is added to its logit), by token id. ``logprobs`` None is off; k asks for the
    log-probability of every chosen token and of the k most likely ones. ``constraint`` None leaves the answer free.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0
