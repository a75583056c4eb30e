"""Warming up runs the model and leaves no trace."""

from __future__ import annotations

import pytest

from prismserve.core.errors import EngineError
from prismserve.core.types import FinishReason, TokenOutput, WorkerStats
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.models.loader import load_model
from prismserve.models.processing import Processor
from prismserve.models.reference import reference_path
from prismserve.worker_runtime.warmup import PASSES, warm_up


@pytest.fixture
def engine_and_processor() -> tuple[Engine, Processor]:
    processor = Processor.from_directory(reference_path())
    model = load_model(reference_path(), dtype="float32")
    return Engine(model, processor, EngineConfig(kv_cache_bytes=16 << 20)), processor


def test_a_warm_engine_is_as_good_as_new(engine_and_processor: tuple[Engine, Processor]) -> None:
    engine, processor = engine_and_processor
    stages: list[tuple[str, int, int]] = []
    warm_up(engine, processor, lambda *stage: stages.append(stage))
    assert stages[-1] == ("warm-up", PASSES, PASSES)
    assert engine.stats() == WorkerStats(kv_blocks_total=engine.pool.groups)
    assert len(engine.image_cache) == 0
    assert engine.cached_keys() == []
    assert not engine.has_work
    engine.check_integrity()


def test_a_model_that_does_not_run_is_found_out(
    engine_and_processor: tuple[Engine, Processor], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, processor = engine_and_processor
    failed = TokenOutput("warm-up", 0, (), FinishReason.ERROR, "no")
    monkeypatch.setattr(engine, "step", lambda: [failed])
    with pytest.raises(EngineError, match="does not run: no"):
        warm_up(engine, processor, lambda *_: None)
