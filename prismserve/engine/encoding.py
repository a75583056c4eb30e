"""Gets the images of waiting sequences ready, a bounded number per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prismserve.compression.base import Share
from prismserve.compression.loader import visual_method
from prismserve.core.errors import InvalidRequestError, PrismServeError
from prismserve.core.hashing import canonical_json, digest
from prismserve.engine.image_cache import ImageLabel
from prismserve.engine.metrics import MovingAverage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prismserve.core.types import MediaInput, MethodSpec, Request
    from prismserve.engine.image_cache import ImageCache
    from prismserve.engine.sequence import ImageSpan, Sequence
    from prismserve.engine.vision import VisionPipeline
    from prismserve.models.base import ImageInputs


@dataclass(slots=True)
class _Job:
    """One image to encode, and who waits for it."""

    key: bytes
    media: MediaInput
    inputs: ImageInputs
    spec: MethodSpec
    scoring_token_ids: tuple[int, ...]
    label: ImageLabel
    takers: list[Sequence]


class ImageStage:
    """Fills ``Sequence.images`` from the cache or by encoding.

    Attributes:
        derived: images that were derived from the same image under a larger budget.
        token_s: moving average of the time of encoding, in seconds for each visual token before compression.
    """

    def __init__(
        self, pipeline: VisionPipeline, cache: ImageCache, clock: Callable[[], float], *, derives: bool = True
    ) -> None:
        """Encode with ``pipeline``; ``clock`` measures, in seconds; ``derives`` lets larger budgets stand for smaller."""
        self._pipeline = pipeline
        self._cache = cache
        self._clock = clock
        self._derives = derives
        self.derived = 0
        self.token_s = MovingAverage()

    def run(
        self, candidates: Iterable[tuple[Sequence, int]], max_images: int
    ) -> tuple[list[tuple[Sequence, PrismServeError]], int]:
        """Get images ready, in the order given.

        Args:
            candidates: sequences, each with its number of cached prefix tokens; images wholly within are not needed.
            max_images: how many may be encoded now; the rest wait for the next step.

        Returns:
            Sequences that cannot be served, each with its error, and how many images were encoded.
        """
        jobs: dict[bytes, _Job] = {}
        failed: list[tuple[Sequence, PrismServeError]] = []
        started = self._clock()
        for sequence, cached_tokens in candidates:
            try:
                self._collect(sequence, sequence.missing_images(cached_tokens), jobs, max_images)
            except PrismServeError as error:
                failed.append((sequence, error))
                for job in jobs.values():
                    job.takers = [taker for taker in job.takers if taker is not sequence]
        groups: dict[MethodSpec, list[_Job]] = {}
        for job in jobs.values():
            if job.takers:
                groups.setdefault(job.spec, []).append(job)
        for spec, members in groups.items():
            failed.extend(self._encode(spec, members))
        elapsed = self._clock() - started
        for taker in {id(taker): taker for job in jobs.values() for taker in job.takers}.values():
            taker.timings.encode_s += elapsed
        return failed, sum(len(members) for members in groups.values())

    def _collect(self, sequence: Sequence, missing: list[ImageSpan], jobs: dict[bytes, _Job], limit: int) -> None:
        for span in missing:
            key, index = span.segment.key, span.segment.media_index
            held = self._cache.get(key)
            label = image_label(sequence.request, index)
            if held is None and self._derives:
                held = self._cache.derive(key, label, span.segment.tokens)
                self.derived += held is not None
            if held is not None:
                sequence.images[key] = held
            elif key in jobs:
                jobs[key].takers.append(sequence)
            elif len(jobs) < limit:
                media = sequence.request.media
                if not 0 <= index < len(media):
                    message = f"image {index} must be encoded, but the request carries {len(media)} images"
                    raise InvalidRequestError(message, field="media", request_id=sequence.request.request_id)
                inputs = self._pipeline.inputs(media, index)
                sequence.timings.images_encoded += 1
                request = sequence.request
                spec, scoring = request.compression.visual, request.scoring_token_ids
                jobs[key] = _Job(key, media[index], inputs, spec, scoring, label, [sequence])

    def _encode(self, spec: MethodSpec, jobs: list[_Job]) -> list[tuple[Sequence, PrismServeError]]:
        started = self._clock()
        try:
            results = self._pipeline.encode(
                [job.key for job in jobs],
                [job.media for job in jobs],
                [job.inputs for job in jobs],
                spec,
                [job.scoring_token_ids for job in jobs],
                [job.label for job in jobs],
            )
        except PrismServeError as error:
            if len(jobs) > 1:
                # What one image or video cannot be given is no reason to refuse those it happened to wait with.
                return [failure for job in jobs for failure in self._encode(spec, [job])]
            return [(taker, error) for taker in jobs[0].takers]
        self.token_s.add((self._clock() - started) / max(1, sum(visual.raw_tokens for visual in results)))
        for job, visual in zip(jobs, results, strict=True):
            for taker in job.takers:
                taker.images[job.key] = visual
        return []


def image_label(request: Request, index: int) -> ImageLabel:
    """Whose image ``index`` of a request is, and its family under all budgets of a nested method.

    The request's namespace stands for model and tenant: images are derived for whoever could have shared them.
    """
    spec = request.compression.visual
    method = visual_method(spec.name)
    if not method.nested or method.share is not Share.AGNOSTIC or not 0 <= index < len(request.media):
        return ImageLabel(request.tenant, request.cache_share)
    media = request.media[index]
    rest = {name: value for name, value in spec.params if name != "keep"}
    family = digest(
        "image-family",
        request.namespace,
        media.pixel_hash,
        media.kind.encode(),
        len(request.media).to_bytes(4, "little"),
        spec.name.encode(),
        canonical_json(rest),
    )
    return ImageLabel(request.tenant, request.cache_share, family)
