"""What the benchmarks that ask an engine in this process share: arguments, requests, answers, and who was right."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.demo_accuracy import Question, Score
from prismserve.core.errors import PrismServeError
from prismserve.core.hashing import digest
from prismserve.core.types import (
    CompressionPlan,
    MediaInput,
    MediaSegment,
    Prompt,
    Request,
    SamplingParams,
    Segment,
    TextSegment,
)

if TYPE_CHECKING:
    from prismserve.engine.engine import Engine
    from prismserve.models.processing import Processor


def request_about(
    name: str,
    rendered: Sequence[Any],
    media: tuple[MediaInput, MediaSegment],
    plan: CompressionPlan,
    scoring_ids: tuple[int, ...],
    *,
    namespace: str,
    max_tokens: int,
) -> Request:
    """One greedy request about one image or video.

    Args:
        name: the request's id.
        rendered: token ids with one slot among them, from ``Processor.render_chat``.
        media: what stands at the slot: its data, and its segment of the prompt.
        plan: compression of the request.
        scoring_ids: what a method that asks about the question ranks by.
        namespace: keeps cached prefixes of different benchmarks and plans apart, together with ``plan``.
        max_tokens: of the answer.
    """
    at = next(i for i, item in enumerate(rendered) if not isinstance(item, int))
    before, after = (tuple(i for i in part if isinstance(i, int)) for part in (rendered[:at], rendered[at + 1 :]))
    shown, segment = media
    segments: list[Segment] = [TextSegment(before), segment, TextSegment(after)]
    root = digest(namespace, plan.visual.fingerprint(), plan.prefill.fingerprint())
    return Request(
        request_id=name,
        attempt=0,
        namespace=root,
        wire_namespace=root,
        prompt=Prompt(tuple(segment for segment in segments if segment.tokens)),
        media=(shown,),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        compression=plan,
        scoring_token_ids=scoring_ids,
    )


def answered(engine: Engine, requests: Sequence[Request], left: dict[str, int] | None = None) -> dict[str, list[int]]:
    """Tokens of each request; PrismServeError of the first that failed.

    Args:
        engine: with room for all.
        requests: to answer.
        left: filled with the visual tokens left behind the last cut of a method inside the decoder.
    """
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request, worker="local")
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise PrismServeError(output.error)
            answers[output.request_id] += output.token_ids
            if left is not None and output.report is not None and output.report.visual_tokens_by_cut:
                left[output.request_id] = output.report.visual_tokens_by_cut[-1]
    return answers


def scored(
    processor: Processor, questions: Sequence[Question], answers: Mapping[str, list[int]], families: Sequence[str]
) -> dict[str, Score]:
    """Exact matches of each family that was asked; the request of a question is named by its place among them."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for index, question in enumerate(questions):
        asked[question.family] += 1
        right[question.family] += processor.decode(answers[str(index)]).strip() == question.answer
    return {name: Score(right[name], asked[name]) for name in families if asked[name]}


def add_budgets(parser: argparse.ArgumentParser, keeps: Sequence[int]) -> None:
    """Add ``--methods`` and ``--keeps``."""
    parser.add_argument("--methods", help="names separated by commas (default: all)")
    parser.add_argument("--keeps", default=",".join(map(str, keeps)), help="counts of 196 (default: %(default)s)")


def budgets_of(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, known: Sequence[str], tokens: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The methods and counts asked for; ends the program where they or ``--per-family`` make no sense."""
    names = tuple(known) if arguments.methods is None else tuple(arguments.methods.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"unknown methods {', '.join(unknown)}; available: {', '.join(known)}")
    try:
        keeps = tuple(int(keep) for keep in arguments.keeps.split(","))
    except ValueError as error:
        parser.error(f"--keeps: {error}")
    if arguments.per_family < 1 or not all(1 <= keep <= tokens for keep in keeps):
        parser.error(f"--per-family must be at least 1, and --keeps between 1 and {tokens}")
    return names, keeps
