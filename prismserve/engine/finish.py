"""When a request ends, and whether it can be served at all: pure rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.core.errors import ContextLengthError, EngineError, InvalidRequestError, PrismServeError
from prismserve.core.types import FinishReason, MediaSegment, TextSegment

if TYPE_CHECKING:
    from prismserve.core.types import Request, SamplingParams
    from prismserve.engine.sequence import Sequence


def finish_reason(sequence: Sequence, eos_token_ids: frozenset[int], max_model_len: int) -> FinishReason | None:
    """Why generation ends after the sequence's last generated token, or None if it goes on."""
    params = sequence.request.sampling
    token = sequence.generated[-1]
    if sequence.matcher is not None and sequence.matcher.done:
        return FinishReason.STOP
    if len(sequence.generated) > params.min_tokens and (
        token in params.stop_token_ids or (token in eos_token_ids and not params.ignore_eos)
    ):
        return FinishReason.STOP
    if len(sequence.generated) >= params.max_tokens or sequence.context_tokens >= max_model_len:
        return FinishReason.LENGTH
    return None


def blocked_tokens(params: SamplingParams, generated: int, eos_token_ids: frozenset[int]) -> tuple[int, ...]:
    """Tokens that must not be chosen: ends before ``min_tokens``, and the end of a constraint that ``ignore_eos``."""
    early = generated < params.min_tokens
    if not early and not (params.ignore_eos and params.constraint is not None):
        return ()
    ends = eos_token_ids if params.constraint is not None or not params.ignore_eos else ()
    return tuple(sorted({*ends, *(params.stop_token_ids if early else ())}))


def no_token_error(sequence: Sequence) -> PrismServeError:
    """Why the sampler found no token for a sequence."""
    request_id = sequence.request.request_id
    if sequence.matcher is not None and sequence.matcher.error:
        message = f"the constraint lets no token follow: {sequence.matcher.error}"
        return InvalidRequestError(message, field="constraint", request_id=request_id)
    message = "no token could be chosen: the model's logits are not finite, or none is allowed"
    return EngineError(message, request_id=request_id)


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
    biased = [token for token, _ in request.sampling.logit_bias]
    lists = [*ids, request.resume_token_ids, request.scoring_token_ids, request.sampling.stop_token_ids, biased]
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
