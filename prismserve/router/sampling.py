"""Sampling fields of the APIs to ``SamplingParams``, strictly; the fields that are refused, with the reason."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Final, TypeVar

from prismserve.core.errors import InvalidRequestError
from prismserve.core.types import SamplingParams
from prismserve.router.fields import INT64_MAX, array, boolean, integer, mapping, number, refuse, text
from prismserve.router.structured import read_constraint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prismserve.router.config import RouterConfig

_T = TypeVar("_T")

COMPLETION_MAX_TOKENS: Final = 16
"""``max_tokens`` of a raw completion that gives none, as OpenAI's."""
_MAX_TOKENS_LIMIT: Final = 2**31 - 1
_STOP_IDS_MAX: Final = 128
# Below this the division of logits overflows float32 long before sampling differs from greedy.
_TEMPERATURE_MIN: Final = 1e-3
_PENALTY_MAX: Final = 2.0
_BIAS_MAX: Final = 100.0
_BIAS_ENTRIES_MAX: Final = 1024
_TOP_LOGPROBS_MAX: Final = 20

# Fields that would change the answer and are not served: refused unless they hold the harmless value given here.
_NOT_SERVED: Final[Mapping[str, tuple[Any, ...]]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1, 1.0),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "processor": (),
    "processor_kwargs": ({},),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}


def refuse_unserved(body: Mapping[str, Any]) -> None:
    """400 for every field that would change the answer if it were served; unknown fields are ignored."""
    for field, harmless in _NOT_SERVED.items():
        value = body.get(field)
        if value is None or any(type(value) is type(item) and value == item for item in harmless):
            continue
        refuse(field, "is not supported; leave it out")


def _stop(body: Mapping[str, Any], config: RouterConfig) -> tuple[str, ...]:
    value = body.get("stop")
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else array(value, "stop", items_max=config.max_stop_strings)
    stops = tuple(text(item, "stop", chars_max=config.max_stop_chars) for item in items)
    if not all(stops):
        refuse("stop", "must not hold an empty string")
    return stops


def _stop_token_ids(body: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    value = body.get("stop_token_ids")
    if value is None:
        return ()
    ids = array(value, "stop_token_ids", items_max=_STOP_IDS_MAX)
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
            refuse("stop_token_ids", f"must hold token ids between 0 and {vocab_size - 1}")
    return tuple(ids)


def _logit_bias(body: Mapping[str, Any], vocab_size: int) -> tuple[tuple[int, float], ...]:
    value = body.get("logit_bias")
    if value is None:
        return ()
    entries = mapping(value, "logit_bias")
    if len(entries) > _BIAS_ENTRIES_MAX:
        refuse("logit_bias", f"has {len(entries)} entries, at most {_BIAS_ENTRIES_MAX} are allowed")
    bias: dict[int, float] = {}
    for name in entries:
        token = int(name) if name.isascii() and name.isdecimal() and len(name) <= 10 else vocab_size
        if token >= vocab_size:
            refuse("logit_bias", f"its names must be token ids between 0 and {vocab_size - 1}")
        try:
            bias[token] = _or(number(entries, name, -_BIAS_MAX, _BIAS_MAX), 0.0)
        except InvalidRequestError as error:
            refuse("logit_bias", f"token {error.message}")
    return tuple(sorted(bias.items()))


def _logprobs(body: Mapping[str, Any], *, chat: bool) -> int | None:
    """Alternatives per token, None without log-probabilities: two fields in a chat, a number in a completion."""
    if not chat and not isinstance(body.get("logprobs"), bool):
        return integer(body, "logprobs", 0, _TOP_LOGPROBS_MAX)
    wanted = boolean(body, "logprobs")
    top = integer(body, "top_logprobs", 0, _TOP_LOGPROBS_MAX)
    if top and not wanted:
        refuse("top_logprobs", "is only allowed with logprobs: true")
    return (top or 0) if wanted else None


def choices_of(body: Mapping[str, Any], config: RouterConfig) -> int:
    """How many answers are asked for (``n``); InvalidRequestError if too many."""
    return _or(integer(body, "n", 1, config.max_choices), 1)


def _max_tokens(body: Mapping[str, Any], default: int | None) -> int | None:
    old = integer(body, "max_tokens", 1, _MAX_TOKENS_LIMIT)
    new = integer(body, "max_completion_tokens", 1, _MAX_TOKENS_LIMIT)
    if old is not None and new is not None and old != new:
        refuse("max_tokens", "differs from max_completion_tokens; give one of them")
    given = new if new is not None else old
    return given if given is not None else default


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def parse_sampling(
    body: Mapping[str, Any],
    config: RouterConfig,
    *,
    vocab_size: int,
    max_tokens_default: int | None,
    chat: bool,
) -> tuple[SamplingParams, bool]:
    """Read the sampling fields of a request.

    Args:
        body: the decoded body; untrusted.
        config: limits and the default temperature.
        vocab_size: bounds ``stop_token_ids`` and ``logit_bias``.
        max_tokens_default: used when the request gives none; None leaves it to the context that remains.
        chat: whether ``logprobs`` is written as in chats.

    Returns:
        The parameters, and whether ``max_tokens`` was settled here (False: the caller fills the context).

    Raises:
        InvalidRequestError: naming the first field at fault.
    """
    max_tokens = _max_tokens(body, max_tokens_default)
    min_tokens = _or(integer(body, "min_tokens", 0, _MAX_TOKENS_LIMIT), 0)
    if max_tokens is not None and min_tokens > max_tokens:
        refuse("min_tokens", f"must not exceed max_tokens ({max_tokens})")
    seed = integer(body, "seed", 0, INT64_MAX)
    top_k = _or(integer(body, "top_k", -1, 2**31 - 1), 0)
    temperature = _or(number(body, "temperature", 0.0, 2.0), config.default_temperature)
    params = SamplingParams(
        max_tokens=max_tokens or 1,
        min_tokens=min_tokens,
        temperature=temperature if temperature >= _TEMPERATURE_MIN else 0.0,
        top_p=_or(number(body, "top_p", 0.0, 1.0, above_low=True), 1.0),
        top_k=max(top_k, 0),
        min_p=_or(number(body, "min_p", 0.0, 1.0), 0.0),
        repetition_penalty=_or(number(body, "repetition_penalty", 0.0, 2.0, above_low=True), 1.0),
        presence_penalty=_or(number(body, "presence_penalty", -_PENALTY_MAX, _PENALTY_MAX), 0.0),
        frequency_penalty=_or(number(body, "frequency_penalty", -_PENALTY_MAX, _PENALTY_MAX), 0.0),
        seed=secrets.randbits(63) if seed is None else seed,
        stop=_stop(body, config),
        stop_token_ids=_stop_token_ids(body, vocab_size),
        ignore_eos=boolean(body, "ignore_eos"),
        logit_bias=_logit_bias(body, vocab_size),
        logprobs=_logprobs(body, chat=chat),
        constraint=read_constraint(body, config),
    )
    return params, max_tokens is not None
