"""``make demo``: start a small cluster, ask it about pictures through both front doors, stop it, and judge all of it.

The exit status is 0 only if the answers are right, the work was split between two processes, compression and caches
did what the usage reports must show, and nothing was left behind.
"""

from __future__ import annotations

import argparse
import base64
import io
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Literal

from rich.console import Console
from rich.table import Table

from prismserve.client import Client, ClusterStatus, Usage
from prismserve.cluster.served import Addresses, ServedCluster, Shutdown
from prismserve.cluster.signals import deadline, handled, terminate
from prismserve.core.errors import ConfigurationError, EngineError, PrismServeError
from prismserve.models.reference.scenes import make_scene

if TYPE_CHECKING:
    import openai
    from PIL.Image import Image

SERVE: Final = (
    *("--model", "reference", "--prefill-replicas", "1", "--decode-replicas", "1"),
    # Replays would move the counters that are shown.
    *("--fidelity-share", "0"),
)
RIGHT_SHARE_MIN: Final = 0.8
_ANSWER_TOKENS_MAX: Final = 32
_ASK_TIMEOUT_S: Final = 30.0
_WIDTH_MIN: Final = 144
_SEEDS: Final = {"A": 10_000_006, "B": 10_000_002, "C": 10_000_020}
_KEEP_49: Final = {"visual": {"method": "visionzip", "keep": 49}}
_KEEP_98_INT8: Final = {"visual": {"method": "visionzip", "keep": 98}, "wire": {"codec": "int8"}}

Door = Literal["openai", "grpc"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One question.

    Attributes:
        door: which front door it goes through.
        picture: key of the scene.
        family: of the scene's questions, this family's...
        index: ...with this index.
        compression: the request's own; ``off`` is exact.
        keep: visual tokens that must be left, or None for all of them.
        cached: whether part of the prompt must come from a cache.
    """

    door: Door
    picture: str
    family: str
    index: int = 0
    compression: str | Mapping[str, Any] = "off"
    keep: int | None = None
    cached: bool = False


ASKS: Final = (
    Ask("openai", "A", "color"),
    Ask("openai", "A", "number", cached=True),
    Ask("openai", "B", "caption"),
    Ask("openai", "C", "shape", compression=_KEEP_49, keep=49),
    Ask("grpc", "C", "word", compression=_KEEP_49, keep=49, cached=True),
    Ask("grpc", "B", "position", compression=_KEEP_98_INT8, keep=98),
    Ask("grpc", "A", "color", cached=True),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one question.

    Attributes:
        ask: the question's place in the demo.
        question: its words.
        expected: the right answer.
        answer: the model's.
        usage: the report that came with it.
        ttft_s: from sending the request to the first text, as the client saw it, in seconds.
        total_s: from sending the request to the end of the answer, in seconds.
    """

    ask: Ask
    question: str
    expected: str
    answer: str
    usage: Usage
    ttft_s: float
    total_s: float

    @property
    def right(self) -> bool:
        """Exact match."""
        return self.answer == self.expected


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether one thing that must hold did."""

    name: str
    held: bool
    detail: str


def usage_of_openai(usage: Any) -> Usage:
    """The usage report in an answer of the ``openai`` package.

    Args:
        usage: ``CompletionUsage`` with our own fields under ``prismserve``.

    Raises:
        EngineError: there is none, or its report is missing.
    """
    report = getattr(usage, "prismserve", None)
    if not isinstance(report, Mapping):
        message = "the answer came without a usage report: `usage.prismserve` is missing"
        raise EngineError(message)
    known = {field.name for field in fields(Usage)} - {"compression"}  # an object over HTTP, text over gRPC
    details = usage.prompt_tokens_details
    counts = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": (details.cached_tokens if details is not None else None) or 0,
    }
    return Usage(**{**{name: value for name, value in report.items() if name in known}, **counts})


def judge(outcomes: Sequence[Outcome], status: ClusterStatus) -> list[Finding]:
    """What the answers, the usage reports and the list of workers show."""
    right = sum(outcome.right for outcome in outcomes)
    pids = {worker.id: worker.pid for worker in status.workers}
    roles = {worker.id: worker.role for worker in status.workers}
    split = [
        outcome
        for outcome in outcomes
        if outcome.usage.kv_bytes_sent
        and roles.get(outcome.usage.prefill_worker) == "prefill"
        and roles.get(outcome.usage.decode_worker) == "decode"
        and pids[outcome.usage.prefill_worker] != pids[outcome.usage.decode_worker]
    ]
    kept = [_kept_as_asked(outcome) for outcome in outcomes]
    hits = [outcome.usage.cached_tokens > 0 for outcome in outcomes if outcome.ask.cached]
    pictures = {outcome.ask.picture for outcome in outcomes}
    by_question: dict[tuple[str, str], set[str]] = {}
    for outcome in outcomes:
        if outcome.ask.compression == "off":
            by_question.setdefault((outcome.ask.picture, outcome.question), set()).add(outcome.answer)
    return [
        Finding(
            "answers",
            right >= RIGHT_SHARE_MIN * len(outcomes),
            f"{right} of {len(outcomes)} right, about {len(pictures)} pictures",
        ),
        Finding(
            "two processes",
            bool(split),
            f"{len(split)} of {len(outcomes)} answers were prefilled in one process and decoded in another; the router's "
            f"reasons: {', '.join(sorted({outcome.usage.route_reason or 'none given' for outcome in outcomes}))}",
        ),
        Finding("compression", all(kept), f"{sum(kept)} of {len(kept)} answers kept as many visual tokens as asked"),
        Finding("caches", all(hits), f"{sum(hits)} of {len(hits)} repeats took a part of their prompt from a cache"),
        Finding(
            "exactness",
            all(len(answers) == 1 for answers in by_question.values()),
            "asking again gave the same answer, through either door",
        ),
    ]


def _kept_as_asked(outcome: Outcome) -> bool:
    usage = outcome.usage
    expected = usage.visual_tokens_before if outcome.ask.keep is None else outcome.ask.keep
    return 0 < usage.visual_tokens_after == expected


def judge_shutdown(shutdown: Shutdown) -> list[Finding]:
    """Whether the cluster stopped as it must."""
    return [
        Finding(
            "clean stop",
            shutdown.exit_code == 0,
            f"exit status {shutdown.exit_code}, {shutdown.duration_s:.1f} s after SIGTERM",
        ),
        Finding("nothing left", not shutdown.leftovers, shutdown.leftovers.describe()),
    ]


def answers_table(outcomes: Sequence[Outcome]) -> Table:
    """What was asked and answered."""
    table = Table(title="Answers", title_justify="left")
    for name in ("#", "front door", "picture", "compression"):
        table.add_column(name, no_wrap=True)
    table.add_column("question", min_width=36)
    for name in ("answer", "expected"):
        table.add_column(name, min_width=16)
    table.add_column("", no_wrap=True)
    for number, outcome in enumerate(outcomes, 1):
        ask = outcome.ask
        verdict = "right" if outcome.right else "WRONG"
        cells = (ask.door, ask.picture, compression_text(ask.compression))
        table.add_row(str(number), *cells, outcome.question, outcome.answer, outcome.expected, verdict)
    return table


def cost_table(outcomes: Sequence[Outcome]) -> Table:
    """What each answer took."""
    table = Table(title="What each answer took", title_justify="left")
    table.add_column("#", no_wrap=True)
    for name in ("TTFT", "tokens/s", "visual tokens", "prompt cached", "images cached", "KV moved"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("transport", "prefill worker", "decode worker"):
        table.add_column(name, no_wrap=True)
    for number, outcome in enumerate(outcomes, 1):
        usage = outcome.usage
        table.add_row(
            str(number),
            f"{outcome.ttft_s * 1e3:.0f} ms",
            f"{usage.completion_tokens / outcome.total_s:.0f}",
            f"{usage.visual_tokens_before} -> {usage.visual_tokens_after}",
            f"{usage.cached_tokens} of {usage.prompt_tokens}",
            f"{usage.images_cached} of {usage.images}",
            size_text(usage.kv_bytes_sent),
            usage.transport or "-",
            usage.prefill_worker or "-",
            usage.decode_worker or "-",
        )
    return table


def compression_text(compression: str | Mapping[str, Any]) -> str:
    """A short name of a request's compression."""
    if isinstance(compression, str):
        return compression
    visual, wire = compression.get("visual", {}), compression.get("wire", {})
    return " + ".join(filter(None, (f"{visual.get('method', '')} {visual.get('keep', '')}".strip(), wire.get("codec"))))


def size_text(count_bytes: int) -> str:
    """A byte count for people."""
    return f"{count_bytes / 1024:.1f} KiB" if count_bytes else "0"


def ask_all(addresses: Addresses, console: Console) -> tuple[list[Outcome], ClusterStatus]:
    """Ask every question of the demo, one after the other, and fetch the list of workers."""
    pictures = {name: make_scene(seed) for name, seed in _SEEDS.items()}
    outcomes = []
    with _openai_client(addresses) as http, Client(addresses.grpc, timeout_s=_ASK_TIMEOUT_S) as grpc:
        model = grpc.models()[0].id
        for ask in ASKS:
            image, questions = pictures[ask.picture]
            _, question, expected = [entry for entry in questions if entry[0] == ask.family][ask.index]
            began = time.monotonic()
            pieces = (
                _stream_openai(http, model, image, question, ask.compression)
                if ask.door == "openai"
                else _stream_grpc(grpc, image, question, ask.compression)
            )
            text, first_s, usage = "", 0.0, None
            for piece, report in pieces:
                first_s = first_s or (time.monotonic() - began if piece else 0.0)
                text += piece
                usage = report or usage
            total_s = time.monotonic() - began
            if usage is None:
                message = f"the answer to {question!r} ended without a usage report"
                raise EngineError(message)
            outcomes.append(Outcome(ask, question, expected, text.strip(), usage, first_s, total_s))
            console.print(f"  {question} -> {text.strip()}", highlight=False, markup=False)
        return outcomes, grpc.status()


def _openai_client(addresses: Addresses) -> openai.OpenAI:
    try:
        import openai
    except ModuleNotFoundError:
        message = "the demo asks through the official `openai` package: pip install 'prismserve[test]'"
        raise ConfigurationError(message) from None
    return openai.OpenAI(base_url=addresses.base_url, api_key="none", max_retries=0, timeout=_ASK_TIMEOUT_S)


def _stream_openai(
    client: openai.OpenAI, model: str, image: Image, question: str, compression: str | Mapping[str, Any]
) -> Iterator[tuple[str, Usage | None]]:
    content: Any = [
        {"type": "image_url", "image_url": {"url": data_uri(image)}},
        {"type": "text", "text": question},
    ]
    import openai

    try:
        yield from _chunks(client, model, content, compression)
    except openai.OpenAIError as error:
        message = f"the question {question!r} failed over HTTP: {error}"
        raise EngineError(message) from error


def _chunks(
    client: openai.OpenAI, model: str, content: Any, compression: str | Mapping[str, Any]
) -> Iterator[tuple[str, Usage | None]]:
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=_ANSWER_TOKENS_MAX,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"compression": compression},
    )
    with stream:
        for chunk in stream:
            piece = chunk.choices[0].delta.content if chunk.choices else None
            yield piece or "", usage_of_openai(chunk.usage) if chunk.usage is not None else None


def _stream_grpc(
    client: Client, image: Image, question: str, compression: str | Mapping[str, Any]
) -> Iterator[tuple[str, Usage | None]]:
    deltas = client.stream(
        question, images=[image], compression=compression, max_tokens=_ANSWER_TOKENS_MAX, temperature=0.0
    )
    for delta in deltas:
        yield delta.text, delta.usage


def data_uri(image: Image) -> str:
    """The image as a PNG data URI."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def run(timeout_s: float, *, verbose: bool, console: Console) -> int:
    """Run the demo; the exit status."""
    log = (lambda line: console.print(line, markup=False, highlight=False)) if verbose else None
    began = time.monotonic()
    console.print(f"starting: prismserve serve {' '.join(SERVE)}", highlight=False)
    cluster = ServedCluster(SERVE, ready_timeout_s=timeout_s, on_log=log)
    try:
        with handled(signal.SIGTERM, terminate), cluster, deadline(timeout_s):
            addresses = cluster.addresses
            ready_s = time.monotonic() - began
            console.print(f"ready after {ready_s:.1f} s: http={addresses.http} grpc={addresses.grpc}", highlight=False)
            outcomes, status = ask_all(addresses, console)
            console.print("stopping", highlight=False)
    except PrismServeError as error:
        console.print(f"FAILED: {error}", markup=False, highlight=False)
        if cluster.log_tail() not in str(error):
            console.print(cluster.log_tail(), markup=False, highlight=False)
        return 1
    findings = [*judge(outcomes, status), *judge_shutdown(cluster.stop())]
    console.print(answers_table(outcomes), cost_table(outcomes))
    for worker in status.workers:
        console.print(f"{worker.role} worker {worker.id}: process {worker.pid} on {worker.node}", highlight=False)
    for finding in findings:
        verdict = "held  " if finding.held else "FAILED"
        console.print(f"{verdict} {finding.name}: {finding.detail}", markup=False, highlight=False)
    console.print(f"{time.monotonic() - began:.1f} s in all", highlight=False)
    return 0 if all(finding.held for finding in findings) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m prismserve.cluster.commands.demo``."""
    parser = argparse.ArgumentParser(prog="python -m prismserve.cluster.commands.demo", description=__doc__)
    parser.add_argument(
        "--timeout-s", type=float, default=180.0, help="for starting, and again for asking, in seconds (default: 180)"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the cluster logs")
    arguments = parser.parse_args(argv)
    width = max(Console().width, _WIDTH_MIN)
    return run(arguments.timeout_s, verbose=arguments.verbose, console=Console(width=width))


if __name__ == "__main__":
    sys.exit(main())
