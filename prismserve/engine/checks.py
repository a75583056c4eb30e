"""What the engine refuses of calls about a request it holds: taps, compactions and arrivals that do not fit it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.core.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from prismserve.core.types import KVLayout, Request, TokenLogprobs
    from prismserve.engine.imports import ImportTicket
    from prismserve.engine.sequence import Sequence
    from prismserve.engine.taps import Taps
    from prismserve.models.config import DecoderConfig


def check_taps(taps: Taps, sequence: Sequence, layout: KVLayout) -> None:
    """InvalidRequestError for taps outside the prompt or the layers, or on rows that leave between layers."""
    request_id = sequence.request.request_id
    if max(taps.layers) >= layout.layers or max(taps.all_slots) >= sequence.length:
        message = f"a tap lies outside the {layout.layers} layers or the prompt's {sequence.length} slots"
        raise InvalidRequestError(message, field="taps", request_id=request_id)
    if sequence.pruning is not None:
        message = "rows of a prompt under a prefill method leave between layers and cannot be tapped"
        raise InvalidRequestError(message, field="taps", request_id=request_id)


def check_compactable(sequence: Sequence, decoder: DecoderConfig) -> None:
    """EngineError for KV that cannot lose slots: of such a model, or while something else works on it."""
    request_id = sequence.request.request_id
    if decoder.windows or decoder.bidirectional_images:
        message = "KV of a model with sliding windows or bidirectional images cannot be compacted yet"
        raise EngineError(message, request_id=request_id)
    if sequence.staged:
        message = "the request's prompt is on its way through a prefill method, so it cannot be compacted"
        raise EngineError(message, request_id=request_id)
    if sequence.focusing is not None:
        message = "the request's visual method chooses what decoding reads, so its KV cannot be compacted"
        raise EngineError(message, request_id=request_id)
    if sequence.streamed:
        message = "an export reads this request's KV layer by layer, so it cannot be compacted"
        raise EngineError(message, request_id=request_id)


def check_arrival(
    sequence: Sequence,
    request: Request,
    first_token_ids: tuple[int, ...],
    next_position: int,
    first_logprobs: tuple[TokenLogprobs, ...],
    vocab_size: int,
) -> None:
    """EngineError unless what is said of imported KV fits the ``sequence`` that waits for it."""
    request_id = sequence.request.request_id
    if (request.request_id, request.attempt) != sequence.identity or not first_token_ids:
        message = "an import ends with its own request and at least one token"
        raise EngineError(message, request_id=request_id)
    if next_position != sequence.next_position:
        message = f"the first token is said to be at position {next_position}, expected {sequence.next_position}"
        raise EngineError(message, request_id=request_id)
    if any(not 0 <= token < vocab_size for token in first_token_ids):
        message = f"a first token lies outside the vocabulary of {vocab_size}"
        raise EngineError(message, request_id=request_id)
    if len(first_logprobs) != (0 if request.sampling.logprobs is None else len(first_token_ids)):
        message = f"{len(first_token_ids)} first tokens come with {len(first_logprobs)} log-probabilities"
        raise EngineError(message, request_id=request_id)


def accepts_layers(sequence: Sequence, ticket: ImportTicket, layer_tokens: tuple[int, ...], layers: int) -> bool:
    """Whether KV of so many slots in each layer can be that of the ticket's request."""
    if sequence.pruning is None:
        return layer_tokens == (ticket.prompt_tokens,) * layers
    return sequence.pruning.accepts(layer_tokens, ticket.prompt_tokens)
