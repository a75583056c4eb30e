"""From a call to a core ``Request``: images, tokens, segments, cache namespaces and block keys."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prismserve.compression import loader, presets
from prismserve.compression.base import Share
from prismserve.compression.presets_table import Basis, basis_of
from prismserve.compression.wire import uniform
from prismserve.core.errors import ContextLengthError, InvalidRequestError
from prismserve.core.hashing import digest
from prismserve.core.prompt import block_keys, elements, image_key, scored_plan
from prismserve.core.types import (
    CompressionPlan,
    KVLayout,
    MediaInput,
    MediaKind,
    MediaSegment,
    Prompt,
    Request,
    SamplingParams,
    Segment,
    TextSegment,
    namespace,
    prefill_namespace,
    wire_namespace,
)
from prismserve.router.fidelity.compare import TOP_TOKENS
from prismserve.router.sampling import COMPLETION_MAX_TOKENS, parse_sampling, refuse_unserved

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prismserve.core.prompt import Element
    from prismserve.models.processing import MediaSlot, Processor
    from prismserve.router.calls import Call
    from prismserve.router.config import RouterConfig
    from prismserve.router.media import MediaReader


# No text of this many characters per token exists outside of long runs of spaces; tokenizing it would be wasted.
_CHARS_PER_TOKEN_MAX: Final = 128


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a router must know of the served model besides its processor.

    Attributes:
        name: the name clients use.
        fingerprint: 32 bytes over weights and configuration, as the workers register it.
        encoder_fingerprint: 32 bytes over the vision encoder; part of every image key.
        layout: what makes KV interchangeable; part of every block key.
        max_model_len: positions a request may span, prompt and answer together.
        embedding_token_bytes: of one token of an image's embeddings; 0 if that is not known.
    """

    name: str
    fingerprint: bytes
    encoder_fingerprint: bytes
    layout: KVLayout
    max_model_len: int
    embedding_token_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to be placed.

    Attributes:
        keys: chained keys of the prompt's full blocks under ``request.namespace``.
        wire_keys: the same under ``request.wire_namespace``; equal to ``keys`` for exact codecs.
        preset_asked: the preset in whose place a milder one is served; empty where none was stepped back.
        harder: the same request under a lossier wire codec, where its sender leaves that to the server; else None.
    """

    request: Request
    keys: tuple[bytes, ...]
    wire_keys: tuple[bytes, ...]
    preset_asked: str = ""
    harder: Prepared | None = None

    @property
    def image_keys(self) -> tuple[bytes, ...]:
        """Embedding keys, one per image or video in order."""
        return tuple(segment.key for segment in self.request.prompt.media_segments())


def tenant_salt(tenant: str, cache_salt: str) -> bytes:
    """What separates the caches of two tenants, and of two salts within one; b"" for the default tenant unsalted."""
    if not tenant and not cache_salt:
        return b""
    return digest("tenant-salt", tenant.encode(), cache_salt.encode())


class RequestBuilder:
    """Builds requests; images and videos are read in the media threads, text is tokenized in one thread of its own.

    Args:
        processor: tokenizer, chat template and image token counts of the served model.
        facts: identity and limits of the served model.
        config: limits.
        media: reads and hashes images and videos.
        default_compression: preset or method name of requests that give none.
        in_force: what is served to requests that ask for a preset.
    """

    def __init__(
        self,
        processor: Processor,
        facts: ModelFacts,
        config: RouterConfig,
        media: MediaReader,
        default_compression: str,
        in_force: Callable[[str], str] = str,
    ) -> None:
        presets.resolve(None, default_compression)
        self._processor = processor
        self._facts = facts
        self._config = config
        self._media = media
        self._default = default_compression
        self._in_force = in_force
        # One thread: a fast tokenizer must not be entered by two threads at once.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="router-tokenize")

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def build(self, call: Call) -> Prepared:
        """Validate and prepare one call.

        Raises:
            InvalidRequestError: naming the field at fault.
            ContextLengthError: prompt and answer do not fit the context.
        """
        refuse_unserved(call.options)
        default = COMPLETION_MAX_TOKENS if call.messages is None else None
        sampling, settled = parse_sampling(
            call.options,
            self._config,
            vocab_size=self._processor.vocab_size,
            max_tokens_default=default,
            chat=call.messages is not None,
        )
        self._check_media(call)
        plan, preset_asked = self._plan(call)
        self._check_length(call)
        media = await self._media.read(call.media)
        prepared = await self._assembled(call, media, sampling, plan, settled=settled)
        return dataclasses.replace(prepared, preset_asked=preset_asked) if preset_asked else prepared

    async def again(self, call: Call, prepared: Prepared, preset: str | None, max_tokens: int) -> Prepared:
        """The same prompt, to be answered greedily and with log-probabilities.

        Args:
            call: what was asked; its body and media are not needed.
            prepared: the request that was served.
            preset: the preset to answer under; None keeps the plan that was served.
            max_tokens: longest answer.

        Raises:
            InvalidRequestError: the preset cannot act on what the request holds.
        """
        request = prepared.request
        plan = request.compression
        if preset is not None:
            kinds = frozenset(item.kind for item in request.media)
            plan = self._settle(presets.resolve(preset, "off", self._basis(kinds)), kinds, default=False)
        length = min(max_tokens, request.sampling.max_tokens)
        sampling = dataclasses.replace(
            request.sampling,
            temperature=0.0,
            logprobs=TOP_TOKENS,
            max_tokens=length,
            min_tokens=min(length, request.sampling.min_tokens),
        )
        return await self._assembled(call, request.media, sampling, plan, settled=True)

    async def _assembled(
        self,
        call: Call,
        media: tuple[MediaInput, ...],
        sampling: SamplingParams,
        plan: CompressionPlan,
        *,
        settled: bool,
    ) -> Prepared:
        loop = asyncio.get_running_loop()
        work = functools.partial(self._assemble, call, media, sampling, plan, settled=settled)
        return await loop.run_in_executor(self._pool, work)

    def _check_media(self, call: Call) -> None:
        takes = {MediaKind.IMAGE: self._processor.supports_images, MediaKind.VIDEO: self._processor.supports_videos}
        for source in call.media:
            if not takes[source.kind]:
                message = f"{source.field}: the model {self._facts.name!r} does not take {source.kind}s"
                raise InvalidRequestError(message, field=source.field)

    def _plan(self, call: Call) -> tuple[CompressionPlan, str]:
        """What the request asked for, and the preset in whose place it is served; "" where that was not changed."""
        kinds = frozenset(source.kind for source in call.media)
        basis = self._basis(kinds)
        plan = presets.resolve(call.compression, self._default, basis)
        asked = presets.asked(call.compression, self._default)
        served = asked if asked is None else self._in_force(asked)
        if served is not None and served != asked:
            plan = presets.resolve(served, self._default, basis)
        plan = self._settle(plan, kinds, default=call.compression is None)
        return plan, asked if asked is not None and served != asked else ""

    def _basis(self, kinds: frozenset[MediaKind]) -> Basis:
        """What presets find to act on in a request with such media."""
        return basis_of(self._processor.family_name, {kind: self._processor.reducible_of(kind) for kind in kinds})

    def _settle(self, plan: CompressionPlan, kinds: frozenset[MediaKind], *, default: bool) -> CompressionPlan:
        """A plan as it can act on what a request holds; of the server's default, what can act on it."""
        plan = self._check_prefill(plan, kinds, default=default)
        if plan.visual.name == "none":
            return plan
        needs = loader.encoder_needs(plan.visual.name)
        for kind in sorted(kinds):
            reducible = self._processor.reducible_of(kind)
            if reducible is not None and needs <= reducible:
                continue
            if default:
                return dataclasses.replace(plan, visual=presets.resolve("none", "off").visual, preset="custom")
            reason = (
                "has structure that a reduction would break"
                if reducible is None
                else f"gives no {', '.join(sorted(needs - reducible))}"
            )
            message = (
                f"compression.visual: method {plan.visual.name!r} cannot act on the {kind}s of {self._facts.name!r}, "
                f"whose encoder {reason}; leave compression out or ask for 'off'"
            )
            raise InvalidRequestError(message, field="compression.visual")
        return plan

    def _check_prefill(self, plan: CompressionPlan, kinds: frozenset[MediaKind], *, default: bool) -> CompressionPlan:
        """The plan, without a prefill method where there is nothing to reduce, or where the default cannot act."""
        if plan.prefill.name == "none":
            return plan
        without = dataclasses.replace(plan, prefill=presets.resolve("none", "off").prefill)
        if not kinds:
            return without
        method, field = loader.prefill_method(plan.prefill.name), "compression.prefill"
        reason = ""
        if not self._processor.prunable_of(kinds):
            reason = f"cannot act on the visual tokens of {self._facts.name!r}; leave it out"
        elif method.whole and plan.visual.name != "none":
            reason = "needs every token of an image; ask for visual method 'none' with it"
        if not reason:
            method.cuts(loader.config_of(plan.prefill, "prefill"), self._facts.layout.layers)
            # Which slots of a reduced layer hold text is not known before it is computed.
            return dataclasses.replace(plan, wire=uniform(plan.wire))
        if default:
            return dataclasses.replace(without, preset="custom")
        message = f"{field}: method {method.name!r} {reason}"
        raise InvalidRequestError(message, field=field)

    def _check_length(self, call: Call) -> None:
        if call.messages is not None:
            chars = sum(len(part) for m in call.messages for part in m.parts if isinstance(part, str))
        else:
            chars = len(call.prompt or "")
        limit = min(self._config.max_prompt_chars, _CHARS_PER_TOKEN_MAX * self._facts.max_model_len)
        if chars > limit:
            field = "prompt" if call.messages is None else "messages"
            message = f"{field}: {chars} characters of text, at most {limit} are allowed"
            raise ContextLengthError(message, field=field)

    def _assemble(
        self,
        call: Call,
        media: tuple[MediaInput, ...],
        sampling: SamplingParams,
        plan: CompressionPlan,
        *,
        settled: bool,
    ) -> Prepared:
        salt = tenant_salt(call.tenant.name, call.cache_salt)
        scoring = self._scoring(call, plan) if media else None
        prompt = self._prompt(call, media, plan, salt, scoring)
        sampling = self._fit(call, prompt, sampling, settled=settled)
        root = prefill_namespace(namespace(self._facts.fingerprint, self._facts.layout, salt), plan.prefill)
        wire_root = wire_namespace(root, plan.wire, lossy=loader.codec(plan.wire.name).lossy)
        request = Request(
            request_id=uuid.uuid4().hex,
            attempt=0,
            namespace=root,
            wire_namespace=wire_root,
            prompt=prompt,
            media=media,
            sampling=sampling,
            compression=plan,
            tenant=call.tenant.name,
            cache_share=call.tenant.cache_share,
            scoring_token_ids=scoring or (),
        )
        slots = elements(prompt)
        size = self._facts.layout.block_tokens
        keys = tuple(block_keys(root, slots, size))
        wire_keys = keys if wire_root == root else tuple(block_keys(wire_root, slots, size))
        prepared = Prepared(request, keys, wire_keys)
        if call.compression is not None or self._config.harder_codec == "none" or loader.codec(plan.wire.name).lossy:
            return prepared
        return dataclasses.replace(prepared, harder=self._harder(prepared, slots))

    def _harder(self, prepared: Prepared, slots: Sequence[Element]) -> Prepared:
        """The request under the codec that placement may choose for one that gives no compression of its own."""
        codec = loader.codec(self._config.harder_codec)
        wire = loader.normalise(codec, {}, "compression.wire")
        request = prepared.request
        root = wire_namespace(request.namespace, wire, lossy=codec.lossy)
        plan = dataclasses.replace(request.compression, wire=wire, preset="custom")
        harder = dataclasses.replace(request, compression=plan, wire_namespace=root)
        keys = tuple(block_keys(root, slots, self._facts.layout.block_tokens))
        return dataclasses.replace(prepared, request=harder, wire_keys=keys)

    def _scoring(self, call: Call, plan: CompressionPlan) -> tuple[int, ...] | None:
        """The scoring text, where the images' tokens depend on it; None where they depend on the images alone."""
        if call.messages is None or loader.visual_method(plan.visual.name).share is not Share.QUERY:
            return None
        return self._processor.scoring_ids(call.messages)

    def _prompt(
        self,
        call: Call,
        media: Sequence[MediaInput],
        plan: CompressionPlan,
        salt: bytes,
        scoring: tuple[int, ...] | None,
    ) -> Prompt:
        if call.messages is not None:
            times = {index: item.times for index, item in enumerate(media) if item.times is not None}
            tokens: Sequence[int | MediaSlot] = self._processor.render_chat(call.messages, times)
        elif call.prompt_ids is not None:
            self._refuse_placeholder(call.prompt_ids)
            tokens = call.prompt_ids
        else:
            tokens = self._processor.encode_text(call.prompt or "")
        # Embeddings are reused by key alone, so a salted request must not share them either.
        visual = plan.visual.fingerprint()
        visual = digest("salted-plan", visual, salt) if salt else visual
        visual = visual if scoring is None else scored_plan(visual, self._facts.fingerprint, scoring)
        segments: list[Segment] = []
        run: list[int] = []
        for token in tokens:
            if isinstance(token, int):
                run.append(token)
                continue
            if run:
                segments.append(TextSegment(tuple(run)))
                run = []
            segments.append(self._media_segment(token.index, media, plan, visual))
        if run:
            segments.append(TextSegment(tuple(run)))
        return Prompt(tuple(segments))

    def _media_segment(
        self, index: int, media: Sequence[MediaInput], plan: CompressionPlan, visual: bytes
    ) -> MediaSegment:
        item = media[index]
        if item.times is not None:
            layout = self._processor.video_layout(item.width_px, item.height_px, item.times)
            fingerprint = self._processor.video_fingerprint
        else:
            images = sum(entry.kind is MediaKind.IMAGE for entry in media)
            layout = self._processor.image_layout(item.width_px, item.height_px, images=images)
            fingerprint = self._processor.image_fingerprint(images)
        key = image_key(item.pixel_hash, fingerprint, self._facts.encoder_fingerprint, visual)
        kept = layout.kept(loader.kept_tokens(plan.visual, layout.raster_tokens))
        return MediaSegment(index, key, kept, layout.tokens, layout.position_span, layout.position_reach)

    def _refuse_placeholder(self, ids: Sequence[int]) -> None:
        placeholder = next((token for token in ids if token in self._processor.placeholder_ids), None)
        if placeholder is not None:
            message = f"prompt: token id {placeholder} is a placeholder; send images and videos in chat messages"
            raise InvalidRequestError(message, field="prompt")

    def _fit(self, call: Call, prompt: Prompt, sampling: SamplingParams, *, settled: bool) -> SamplingParams:
        limit = self._facts.max_model_len
        field = "prompt" if call.messages is None else "messages"
        room = limit - prompt.raw_tokens
        if not prompt.tokens:
            message = f"{field}: the prompt holds no tokens"
            raise InvalidRequestError(message, field=field)
        if room < 1:
            message = (
                f"{field}: the prompt has {prompt.raw_tokens} tokens, the model's context holds {limit}, "
                "answer included"
            )
            raise ContextLengthError(message, field=field)
        if not settled:
            if sampling.min_tokens > room:
                message = f"min_tokens: {sampling.min_tokens} exceed the {room} tokens left in the context"
                raise ContextLengthError(message, field="min_tokens")
            return dataclasses.replace(sampling, max_tokens=room)
        if sampling.max_tokens > room:
            message = (
                f"max_tokens: {sampling.max_tokens} and the {prompt.raw_tokens} tokens of the prompt exceed the "
                f"model's context of {limit}"
            )
            raise ContextLengthError(message, field="max_tokens")
        return sampling
