from __future__ import annotations

from prismserve.core.types import CompressionPlan
from prismserve.router.usage import Usage, combine


def usage(**changes) -> Usage:
    numbers = dict.fromkeys(Usage.__slots__, 0.0)
    numbers |= {"prompt_tokens": 11, "cached_tokens": 0, "kv_bytes_before": 900, "attempts": 1}
    numbers |= dict.fromkeys(("transport", "prefill_worker", "decode_worker", "route_reason"), "w")
    return Usage(**{**numbers, "compression": CompressionPlan(), "visual_tokens_by_cut": (), **changes})


def test_answers_and_bytes_add_up_and_the_prompt_counts_once() -> None:
    first = usage(completion_tokens=4, kv_bytes_sent=50, prefill_worker="p", ttft_ms=7.0)
    other = usage(completion_tokens=9, cached_tokens=8, attempts=2, route_reason="beside the first choice")
    both = combine([first, other])
    assert (both.prompt_tokens, both.cached_tokens, both.completion_tokens) == (11, 0, 13)
    assert (both.kv_bytes_sent, both.kv_bytes_before, both.attempts) == (50, 900, 2)
    assert (both.prefill_worker, both.ttft_ms) == ("p", 7.0)
    assert both.openai()["total_tokens"] == 24
