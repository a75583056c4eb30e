"""Random encoder outputs for the methods to work on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from prismserve.compression.base import VisualFeatures

MakeFeatures = Callable[..., VisualFeatures]


@pytest.fixture
def make_features() -> MakeFeatures:
    def make(
        count: int = 60, *, seed: int = 0, media: bytes = b"pixels\0\1", dtype: torch.dtype = torch.float32
    ) -> VisualFeatures:
        generator = torch.Generator().manual_seed(seed)
        attention = torch.rand(3, count, generator=generator)
        return VisualFeatures(
            tokens=torch.randn(count, 8, generator=generator).to(dtype),
            grid=(1, count),
            seed=media,
            cls_attention=attention / (attention.sum(1, keepdim=True) + 0.1),
            keys=torch.randn(count, 3, 4, generator=generator).to(dtype),
        )

    return make
