"""Random encoder outputs for the methods to work on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from prismserve.compression.base import VisualFeatures

MakeFeatures = Callable[..., VisualFeatures]


class Attention:
    """What a decoder might answer to ``VisualFeatures.asked``."""

    def __init__(self, tokens: int, question: int) -> None:
        self._tokens, self._question = tokens, question

    def __call__(self, depth: float, reduction: str) -> torch.Tensor:
        seed = 7 * self._question + round(100 * depth) + len(reduction)
        return torch.rand(self._tokens, generator=torch.Generator().manual_seed(seed))


class Guide:
    """What a branch might answer to ``VisualFeatures.guided``."""

    def __init__(self, question: int) -> None:
        self._question = question

    def __call__(self, patches: torch.Tensor, class_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self._question)
        scores = torch.rand(patches.shape[:2], generator=generator)
        return (scores + class_tokens.mean()).softmax(-1), torch.rand(len(patches), 10, generator=generator)


@pytest.fixture
def make_features() -> MakeFeatures:
    def make(
        count: int = 60,
        *,
        seed: int = 0,
        media: bytes = b"pixels\0\1",
        dtype: torch.dtype = torch.float32,
        grid: tuple[int, int] | None = None,
        frames: int = 1,
        question: int = 0,
    ) -> VisualFeatures:
        generator = torch.Generator().manual_seed(seed)
        attention = torch.rand(3, count, generator=generator)
        asked = torch.Generator().manual_seed(1000 + question)
        return VisualFeatures(
            tokens=torch.randn(count, 8, generator=generator).to(dtype),
            grid=grid or (1, count),
            seed=media,
            frames=frames,
            cls_attention=attention / (attention.sum(1, keepdim=True) + 0.1),
            keys=torch.randn(count, 3, 4, generator=generator).to(dtype),
            projected=torch.randn(count, 10, generator=generator).to(dtype),
            text=torch.randn(5 + question, 10, generator=asked).to(dtype),
            asked=Attention(count, question),
            aligned=torch.randn(count, 6, generator=generator).to(dtype),
            aligned_text=torch.randn(1 + question, 6, generator=asked).to(dtype),
            selected=Attention(count, 3 + question),
            unpooled=torch.randn(frames, 2 * count // frames, 10, generator=generator).to(dtype),
            coded=lambda places, codes: codes + places.float().mean(),
            class_token=torch.randn(frames, 8, generator=generator).to(dtype),
            guided=Guide(question),
        )

    return make
