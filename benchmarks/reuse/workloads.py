"""What clients ask: questions about a few shared pictures, and chats of several turns. The same for every cluster."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from benchmarks.workers import Turn, png
from prismserve.models.reference.scenes import make_scene

FIRST_SCENE: Final = 21_000_000
QUESTIONS: Final = (
    "Describe the image.",
    "How many shapes are there?",
    "What is in the image?",
    "What color is the circle?",
    "Is there a square in the image?",
    "Which shape is on the left?",
)
FOLLOW_UPS: Final = (
    "How many shapes are there?",
    "What else is in the image? Describe the colors and where the shapes are.",
    "Is there a circle in the image, and is it above or below the others?",
    "Which shape is on the left, and which one is on the right of it?",
)
ANSWER_TOKENS: Final = 12


@dataclass(frozen=True, slots=True)
class Script:
    """What one client asks in order; in a chat every turn goes on from the answers before it."""

    pictures: tuple[bytes, ...]
    questions: tuple[str, ...]
    chat: bool

    def turn(self, number: int, answers: tuple[str, ...]) -> Turn:
        """The call of turn ``number``, after ``answers``."""
        if not self.chat:
            return Turn((self.questions[number],), self.pictures, ANSWER_TOKENS)
        texts = [self.questions[0]]
        for answer, question in zip(answers, self.questions[1 : number + 1], strict=True):
            texts += [answer, question]
        return Turn(tuple(texts), self.pictures, ANSWER_TOKENS)


def shared_images(pictures: int, questions: int) -> list[Script]:
    """Every picture with every question; in an order in which the same picture comes back after others."""
    drawn = random.Random(1)
    files = [png(make_scene(FIRST_SCENE + number)[0]) for number in range(pictures)]
    pairs = [(file, question) for file in files for question in QUESTIONS[:questions]]
    drawn.shuffle(pairs)
    return [Script((file,), (question,), chat=False) for file, question in pairs]


def chats(conversations: int) -> list[Script]:
    """Chats about a picture each, of as many turns as there are follow-up questions."""
    return [
        Script((png(make_scene(FIRST_SCENE + 1000 + number)[0]),), FOLLOW_UPS, chat=True)
        for number in range(conversations)
    ]
