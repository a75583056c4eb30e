"""Bytes for each new picture beside accuracy: the bundled model's answers over the wire, setting by setting."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from benchmarks.demo_accuracy import Question, Score, draw_questions, encode
from benchmarks.workers import SmallCluster, Turn
from prismserve.core.types import Role

if TYPE_CHECKING:
    from prismserve.router.usage import Usage

OFF: Final = "none"
CONTROL: Final = "random"
METHOD: Final = "prism"
SHARE_MAX: Final = 0.25
POINTS_LOST_MAX: Final = 1.0
SCENES_IN_FLIGHT: Final = 3
_ANSWER_TOKENS_MAX: Final = 48
_Z_95: Final = 1.959964


@dataclass(frozen=True, slots=True)
class Setting:
    """A visual method with the share of tokens it keeps, and a codec."""

    visual: str
    keep: float
    codec: str

    @property
    def compression(self) -> dict[str, Any]:
        """As a request says it."""
        options = {} if self.visual == OFF else {"keep": self.keep}
        return {"visual": {"method": self.visual, **options}, "wire": {"codec": self.codec}}

    @property
    def control(self) -> Setting | None:
        """Random pruning at the same budget; None where nothing is pruned."""
        return None if self.visual == OFF else dataclasses.replace(self, visual=CONTROL)


EXACT: Final = Setting(OFF, 1.0, "none")
SETTINGS: Final = (
    EXACT,
    Setting(OFF, 1.0, "int8"),
    Setting(OFF, 1.0, "int4"),
    Setting(METHOD, 0.5, "int8"),
    Setting(METHOD, 0.5, "int4"),
    Setting(METHOD, 0.25, "none"),
    Setting(METHOD, 0.25, "int8"),
    Setting(METHOD, 0.25, "int4"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """What one setting gave.

    Attributes:
        setting: how it was served.
        score: of all questions.
        lost: points of accuracy lost against the exact setting, over the same questions.
        lost_interval: the same at 95 %, from the questions on which the two differ.
        visual_tokens: kept, mean over the pictures.
        kv_bytes: sent for a picture that the decode worker had never seen, and the first question about it, mean.
        share: of the uncompressed KV of all visual tokens in the dtype of the pool (the question's bytes are counted
            above, and not below).
        share_16_bits: the same beside KV of 16 bits a number.
        control: score of random pruning at the same budget under the same codec; None where nothing is pruned.
    """

    setting: Setting
    score: Score
    lost: float
    lost_interval: tuple[float, float]
    visual_tokens: float
    kv_bytes: float
    share: float
    share_16_bits: float
    control: Score | None

    @property
    def met(self) -> bool:
        """Few enough bytes, and few enough points lost."""
        return self.share <= SHARE_MAX and self.lost <= POINTS_LOST_MAX


@dataclass
class Answers:
    """What one setting answered: whether each question was right, and the reports of the first about each picture."""

    right: dict[int, bool] = field(default_factory=dict)
    first: list[Usage] = field(default_factory=list)

    @property
    def score(self) -> Score:
        """Right answers among all."""
        return Score(sum(self.right.values()), len(self.right))


async def measure(
    per_family: int,
    settings: Sequence[Setting],
    start_timeout_s: float,
    say: Callable[[str], None],
) -> list[Row]:
    """Ask one prefill and one decode worker the same held-out questions in every setting and its control.

    All settings answer about one scene before the next scene comes, in an order that turns with each scene. The first
    question about a scene is alone, so that all KV of the picture is new to the decode worker; the others share it.
    """
    questions = draw_questions(per_family)
    scenes: dict[int, list[int]] = {}
    for number, question in enumerate(questions):
        scenes.setdefault(question.seed, []).append(number)
    every = with_controls(settings)
    answers = {setting: Answers() for setting in every}
    async with SmallCluster(start_timeout_s=start_timeout_s, say=say) as cluster:
        for role in (Role.PREFILL, Role.DECODE):
            await cluster.add_process(role)
        await cluster.open_router(2)
        rest = iter(enumerate(scenes.items()))
        await asyncio.gather(*(_work(cluster, rest, questions, answers, say) for _ in range(SCENES_IN_FLIGHT)))
        layout = cluster.facts.layout if cluster.facts is not None else None
        if layout is None:
            message = "the cluster's model is not known"
            raise RuntimeError(message)
    return [summarise(setting, answers, layout.dtype_bytes) for setting in settings]


def with_controls(settings: Iterable[Setting]) -> list[Setting]:
    """Each setting, and behind it its control."""
    found = (one for setting in settings for one in (setting, setting.control) if one is not None)
    return list(dict.fromkeys(found))


async def _work(
    cluster: SmallCluster,
    scenes: Iterable[tuple[int, tuple[int, list[int]]]],
    questions: Sequence[Question],
    answers: dict[Setting, Answers],
    say: Callable[[str], None],
) -> None:
    for place, (seed, numbers) in scenes:
        picture = encode(seed)
        settings = list(answers)
        turned = settings[place % len(settings) :] + settings[: place % len(settings)]

        async def ask(setting: Setting, number: int, picture: bytes = picture) -> Usage:
            question = questions[number]
            turn = Turn((question.text,), (picture,), _ANSWER_TOKENS_MAX, compression=setting.compression)
            answer = await cluster.ask(turn)
            answers[setting].right[number] = answer.text.strip() == question.answer
            return answer.usage

        for setting in turned:
            answers[setting].first.append(await ask(setting, numbers[0]))
            await asyncio.gather(*(ask(setting, number) for number in numbers[1:]))
        done = len(answers[settings[0]].right)
        say(f"{done} of {len(questions)} questions in each of {len(settings)} settings")


def summarise(setting: Setting, answers: dict[Setting, Answers], dtype_bytes: int) -> Row:
    """The row of one setting among all answers, which hold those of the exact setting and of its control."""
    mine, exact = answers[setting], answers[EXACT]
    worse = sum(exact.right[number] and not right for number, right in mine.right.items())
    better = sum(right and not exact.right[number] for number, right in mine.right.items())
    sent = statistics.fmean(usage.kv_bytes_sent for usage in mine.first)
    whole = statistics.fmean(map(visual_bytes, mine.first))
    control = setting.control
    return Row(
        setting=setting,
        score=mine.score,
        lost=100 * (worse - better) / len(mine.right),
        lost_interval=paired_interval(worse, better, len(mine.right)),
        visual_tokens=statistics.fmean(usage.visual_tokens_after for usage in mine.first),
        kv_bytes=sent,
        share=sent / whole,
        share_16_bits=sent / whole * dtype_bytes / 2,
        control=None if control is None else answers[control].score,
    )


def visual_bytes(usage: Usage) -> float:
    """KV of all visual tokens of a request before any compression."""
    tokens = usage.prompt_tokens - usage.visual_tokens_after + usage.visual_tokens_before
    return usage.kv_bytes_before / tokens * usage.visual_tokens_before


def paired_interval(worse: int, better: int, asked: int) -> tuple[float, float]:
    """Points lost at 95 %, from how many questions only one of the two answered rightly.

    Wald's interval of a difference of paired proportions: R. G. Newcombe, Statistics in Medicine 17 (1998), 2635-2650,
    method 1.
    """
    difference = worse - better
    half = _Z_95 * math.sqrt(worse + better - difference**2 / asked)
    return 100 * (difference - half) / asked, 100 * (difference + half) / asked


def document(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain data, with shares and verdicts."""

    def score(value: Score | None) -> dict[str, Any] | None:
        return None if value is None else {"right": value.right, "asked": value.asked, "interval": value.interval}

    return [
        {
            **dataclasses.asdict(row),
            "score": score(row.score),
            "control": score(row.control),
            "met": row.met,
        }
        for row in rows
    ]
