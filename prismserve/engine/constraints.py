"""Constrained answers: compiled off the engine's thread, then followed token by token.

Grammars are compiled and matched by llguidance, an Earley parser over a token trie that builds its lexer lazily
(https://github.com/guidance-ai/llguidance). Its fuel limits bound the work of one compilation and of one step, so a
hostile schema ends in an error for its own request; the time limit of the caller bounds the wait in the queue too.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import torch

from prismserve.core.errors import EngineError, InvalidRequestError, OverloadedError
from prismserve.core.types import Constraint, ConstraintKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llguidance import LLMatcher, LLTokenizer

    from prismserve.engine.config import EngineConfig
    from prismserve.models.processing import Processor

_THREADS: Final = 2
_PENDING_MAX: Final = 256
_REASON_CHARS: Final = 200
# A lexer state takes 1 to 2 kB: a request can make its matcher grow to some 40 MB and no further.
_LEXER_STATES_MAX: Final = 20_000
# JSON allows white space without end, and a model that falls into it never comes back.
_JSON_SPACE: Final = r"[\x20\x0A\x0D\x09]{0,20}"
_BYTE_BITS: Final = torch.tensor([[byte >> bit & 1 for bit in range(8)] for byte in range(256)], dtype=torch.bool)
_WORD_BITS: Final = 32


class Matcher:
    """How far one request's answer has come in its constraint. Not thread-safe.

    Attributes:
        accepted: generated tokens taken in so far.
        done: nothing may follow any more; the answer is complete.
    """

    def __init__(self, inner: LLMatcher) -> None:
        self._inner = inner
        self.accepted = 0
        self.done = False

    @property
    def error(self) -> str:
        """Why no token can follow, in one line; "" while all is well."""
        return _one_line(self._inner.get_error()) if self._inner.is_error() else ""

    def accept(self, tokens: Sequence[int]) -> bool:
        """Advance by generated tokens; False if they do not fit, after which the matcher is of no use.

        Once ``done``, all that is taken in is the end token that a resumed request still has to give.
        """
        if self.done:
            return True
        fits: bool = self._inner.consume_tokens(list(tokens))
        self.accepted += len(tokens) if fits else 0
        self.done = fits and self._inner.is_stopped()
        return fits

    def fill(self, mask: torch.Tensor) -> None:
        """Set the bits of the tokens that may come next.

        Args:
            mask: [ceil(V / 32)] int32, contiguous, on the CPU; all zero if nothing can follow.
        """
        self._inner.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        if self._inner.is_error():
            mask.zero_()


def allowed_tokens(matchers: Sequence[Matcher], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Which tokens may come next.

    Args:
        matchers: n of them.
        vocab_size: V, the width of the logits.
        device: where the result is wanted; only packed bits travel there.

    Returns:
        [n, V] bool.
    """
    masks = torch.zeros((len(matchers), -(-vocab_size // _WORD_BITS)), dtype=torch.int32)
    for row, matcher in zip(masks, matchers, strict=True):
        matcher.fill(row)
    packed = masks.view(torch.uint8).to(device)  # little-endian words: bit i of byte j is token 8 j + i
    return _BYTE_BITS.to(device)[packed.long()].flatten(1)[:, :vocab_size]


class ConstraintCompiler:
    """Compiles constraints in its own threads and remembers the latest, failures included. Thread-safe.

    Args:
        processor: whose tokenizer the matchers speak.
        vocab_size: width of the logits.
        eos_token_ids: allowed wherever the answer may end.
        config: size limit and number of remembered constraints.
    """

    def __init__(
        self, processor: Processor, vocab_size: int, eos_token_ids: frozenset[int], config: EngineConfig
    ) -> None:
        self._processor = processor
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._config = config
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="constraint")
        self._known: OrderedDict[Constraint, Future[LLMatcher]] = OrderedDict()
        self._pending = 0
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()

    def close(self) -> None:
        """Refuse further work; a running compilation ends by its own limits."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def compile(self, constraint: Constraint) -> Future[Matcher]:
        """Begin to compile.

        Returns:
            A future with a matcher of the caller's own, or InvalidRequestError: the constraint is malformed, cannot
            be satisfied or is too complex. It cannot be cancelled.

        Raises:
            InvalidRequestError: the constraint is too long.
            OverloadedError: too many compilations are waiting.
        """
        nbytes = len(constraint.text.encode())
        if nbytes > self._config.constraint_max_bytes:
            message = f"the constraint takes {nbytes} bytes, at most {self._config.constraint_max_bytes} are allowed"
            raise InvalidRequestError(message, field="constraint")
        matcher: Future[Matcher] = Future()
        matcher.set_running_or_notify_cancel()  # shared work must not end because one caller stopped waiting

        def hand_out(compiled: Future[LLMatcher]) -> None:
            error = compiled.exception()
            if error is not None:
                matcher.set_exception(error)
            else:
                matcher.set_result(Matcher(compiled.result().deep_copy()))

        self._compiled(constraint).add_done_callback(hand_out)
        return matcher

    def _compiled(self, constraint: Constraint) -> Future[LLMatcher]:
        with self._lock:
            known = self._known.get(constraint)
            if known is not None:
                self._known.move_to_end(constraint)
                return known
            if self._pending >= _PENDING_MAX:
                message = f"{self._pending} constraints wait to be compiled"
                raise OverloadedError(message)
            self._pending += 1
            future = self._known[constraint] = self._pool.submit(self._build, constraint)
            while len(self._known) > self._config.constraint_cache_entries:
                self._known.popitem(last=False)
        future.add_done_callback(self._ended)
        return future

    def _ended(self, _: Future[LLMatcher]) -> None:
        with self._lock:
            self._pending -= 1

    def _build(self, constraint: Constraint) -> LLMatcher:
        import llguidance

        limits = llguidance.LLParserLimits(max_lexer_states=_LEXER_STATES_MAX, verbose_errors=False)
        matcher = llguidance.LLMatcher(self._get_tokenizer(), grammar_of(constraint), log_level=0, limits=limits)
        if not matcher.is_error():
            # A constraint that nothing satisfies shows only when the first token is asked for.
            probe = matcher.deep_copy()
            probe.compute_bitmask()
            if not probe.is_error():
                return matcher
            message = "the constraint cannot be satisfied by any text, or is too complex"
            raise InvalidRequestError(message, field="constraint")
        message = f"the constraint cannot be used: {_one_line(matcher.get_error())}"
        raise InvalidRequestError(message, field="constraint")

    def _get_tokenizer(self) -> LLTokenizer:
        """The token trie, built once (about a second for a large vocabulary)."""
        import llguidance.hf

        with self._tokenizer_lock:
            if self._tokenizer is None:
                tokenizer = self._processor.tokenizer
                width = max(self._vocab_size, len(tokenizer))
                try:
                    self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, width, sorted(self._eos_token_ids))
                except (ValueError, RuntimeError) as error:
                    message = f"this model's tokenizer does not support constrained answers: {_one_line(str(error))}"
                    raise InvalidRequestError(message, field="constraint") from error
            return self._tokenizer


def grammar_of(constraint: Constraint) -> str:
    """The constraint in llguidance's own language; InvalidRequestError if it cannot be read."""
    from llguidance import LLMatcher, grammar_from

    try:
        if constraint.kind is ConstraintKind.JSON_SCHEMA:
            return str(LLMatcher.grammar_from_json_schema(constraint.text, {"whitespace_pattern": _JSON_SPACE}))
        if constraint.kind is ConstraintKind.REGEX:
            return str(LLMatcher.grammar_from_regex(constraint.text))
        if constraint.kind is ConstraintKind.CHOICE:
            if not json.loads(constraint.text):
                message = "there is nothing to choose from"
                raise ValueError(message)
            return str(grammar_from("choice", constraint.text))
        return str(grammar_from("grammar", constraint.text))
    except (ValueError, TypeError, RecursionError) as error:
        message = f"the constraint cannot be read as {constraint.kind.value}: {_one_line(str(error))}"
        raise InvalidRequestError(message, field="constraint") from error


def checked_matcher(constraint: Constraint | None, matcher: Matcher | None, resumed: Sequence[int]) -> Matcher | None:
    """The matcher of a request about to enter the engine, advanced by the tokens an earlier attempt emitted.

    Raises:
        EngineError: the constraint was not compiled first.
        InvalidRequestError: those tokens do not fit the constraint.
    """
    if (constraint is None) != (matcher is None):
        message = "a request comes with a matcher exactly if it has a constraint: compile that first"
        raise EngineError(message)
    if matcher is not None and resumed and not matcher.accept(resumed[matcher.accepted :]):
        message = f"the tokens to be continued do not fit the constraint: {matcher.error}"
        raise InvalidRequestError(message, field="constraint")
    return matcher


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_REASON_CHARS]
