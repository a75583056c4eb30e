"""When a request ends, and whether it can be served at all: pure rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.core.errors import ContextLengthError, InvalidRequestError
from prismserve.core.types import FinishReason, MediaSegment, TextSegment

if TYPE_CHECKING:
    from prismserve.core.types import Request, SamplingParams
    from prismserve.engine.sequence import Sequence


def finish_reason(sequence: Sequence, eos_token_ids: frozenset[int], max_model_len: int) -> FinishReason | None:
    """Why generation ends after the sequence's last generated token, or None if it goes on."""
    params = sequence.request.sampling
    token = sequence.generated[-1]
    if len(sequence.generated) > params.min_tokens and (
        token in params.stop_token_ids or (token in eos_token_ids and not params.ignore_eos)
    ):
        return FinishReason.STOP
    if len(sequence.generated) >= params.max_tokens or sequence.context_tokens >= max_model_len:
        return FinishReason.LENGTH
    return None


def blocked_tokens(params: SamplingParams, generated: int, eos_token_ids: frozenset[int]) -> tuple[int, ...]:
    """Tokens that must not be chosen because ``min_tokens`` is not reached."""
    if generated >= params.min_tokens:
        return ()
    ends = () if params.ignore_eos else eos_token_ids
    return tuple(sorted({*ends, *params.stop_token_ids}))


def check_request(request: Request, *, vocab_size: int, max_model_len: int) -> None:
    """Refuse what can never run.

    Raises:
        InvalidRequestError: an empty prompt, a token id outside the vocabulary, or a segment of no sense.
        ContextLengthError: no room for even one new token.
    """
    prompt = request.prompt
    if prompt.tokens == 0:
        message = "the prompt is empty"
        raise InvalidRequestError(message, field="prompt", request_id=request.request_id)
    ids = [s.token_ids for s in prompt.segments if isinstance(s, TextSegment)]
    lists = [*ids, request.resume_token_ids, request.sampling.stop_token_ids]
    if any(run and (min(run) < 0 or max(run) >= vocab_size) for run in lists):
        message = f"a token id lies outside the vocabulary of {vocab_size}"
        raise InvalidRequestError(message, field="token_ids", request_id=request.request_id)
    for segment in prompt.segments:
        if isinstance(segment, MediaSegment) and not 0 < segment.tokens <= segment.raw_tokens:
            message = f"image {segment.media_index} keeps {segment.tokens} of {segment.raw_tokens} visual tokens"
            raise InvalidRequestError(message, field="media", request_id=request.request_id)
        if isinstance(segment, MediaSegment) and not 0 < segment.positions <= segment.raw_tokens:
            message = (
                f"image {segment.media_index} spans {segment.positions} positions with {segment.raw_tokens} tokens"
            )
            raise InvalidRequestError(message, field="media", request_id=request.request_id)
    length = prompt.raw_tokens + len(request.resume_token_ids)
    if length >= max_model_len:
        message = (
            f"the prompt takes {length} tokens ({prompt.visual_tokens_raw} of them from images); "
            f"the context holds {max_model_len} and needs room for at least one new token"
        )
        raise ContextLengthError(message, field="messages", request_id=request.request_id)
