"""What every test shares: one thread of arithmetic per process and fixed seeds."""

from __future__ import annotations

import os

# Before torch is imported anywhere: tests run beside one another, and results must not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tests' clusters are private and short-lived; nothing is reported anywhere.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
from collections.abc import Iterator

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# No deadline per example: a busy machine is no defect. The same examples every time: a failure is one for everybody.
hypothesis.settings.register_profile("prismserve", deadline=None, derandomize=True)
hypothesis.settings.load_profile("prismserve")

if not torch.cuda.is_available():
    # Triton reads this when it is first imported; kernels are then tested in its interpreter. Ops on CPU tensors still
    # take their reference unless a test asks for the kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    """Start every test from the same random state, and give the old one back."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(python_state)
    torch.set_rng_state(torch_state)
