"""What an explanation says is what serving does."""

from __future__ import annotations

import pytest

from prismserve.compression import loader, presets
from prismserve.compression.loader import kept_tokens
from prismserve.core.errors import InvalidRequestError
from prismserve.core.types import MediaSegment
from prismserve.engine.explaining import explain


def asked(workshop, compression, scenes=(3,)):
    plan = presets.resolve(compression, "off")
    return workshop.request("r", workshop.questions(3)[0], scenes, visual=plan)


@pytest.mark.parametrize("method", ["visionzip", "prism", "tome", "uniform"])
def test_the_survivors_of_a_visual_method_are_those_that_are_served(workshop, method) -> None:
    request = asked(workshop, {"visual": {"method": method, "keep": 30}})
    engine = workshop.engine()
    (stage,) = explain(engine, request).stages
    workshop.answers(engine, [request])
    (segment,) = [item for item in request.prompt.segments if isinstance(item, MediaSegment)]
    served = engine.image_cache.get(segment.key).positions.tolist()
    assert [place for place, fate in enumerate(stage.fates) if fate == place] == served
    assert len(served) == kept_tokens(request.compression.visual, 196) == 30
    assert stage.kept + stage.merged + stage.dropped == 196
    assert (stage.merged > 0) == (method in {"visionzip", "tome", "prism"})


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "holitom_inner"])
def test_the_stages_of_a_prefill_method_are_those_the_report_counts(workshop, method) -> None:
    request = asked(workshop, {"visual": {"method": "prism", "keep": 98}, "prefill": {"method": method, "keep": 20}})
    engine = workshop.engine()
    explanation = explain(engine, request)
    assert not engine.has_work
    assert engine.pool.used_groups == 0
    engine.submit(request, worker="local")
    (report,) = [output.report for output in workshop.drive(engine)["r"] if output.report]
    visual, *cuts = explanation.stages
    assert visual.kept == 98
    assert tuple(stage.kept for stage in cuts) == report.visual_tokens_by_cut
    for earlier, later in zip(explanation.stages, cuts, strict=False):
        alive = [fate == place for place, fate in enumerate(earlier.fates)]
        assert all((fate != -2) == there for fate, there in zip(later.fates, alive, strict=True))


def test_every_visual_method_can_be_explained_and_keeps_what_it_says(workshop) -> None:
    engine, able = workshop.engine(), workshop.processor.reducible
    for name in loader.names("visual"):
        method = loader.visual_method(name)
        if name == "none" or not method.training_free or loader.encoder_needs(name) - able:
            continue
        request = asked(workshop, name)
        (stage,) = explain(engine, request).stages
        assert stage.kept == kept_tokens(request.compression.visual, 196), name
        assert stage.kept + stage.merged + stage.dropped == 196, name


def test_places_count_through_several_images(workshop) -> None:
    request = asked(workshop, {"visual": {"method": "tome", "keep": 10}}, scenes=(3, 4))
    (stage,) = explain(workshop.engine(), request).stages
    assert len(stage.fates) == 2 * 196
    assert stage.kept == 20
    assert all(fate // 196 == place // 196 for place, fate in enumerate(stage.fates))


def test_what_reduces_nothing_is_refused(workshop) -> None:
    with pytest.raises(InvalidRequestError, match="every visual token is kept"):
        explain(workshop.engine(), asked(workshop, "off"))
    with pytest.raises(InvalidRequestError, match="no image"):
        explain(workshop.engine(), asked(workshop, "quality", scenes=()))
