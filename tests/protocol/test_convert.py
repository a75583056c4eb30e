"""Every core type survives the wire unchanged, and malformed messages are refused."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from prismserve.core.errors import TransferError
from prismserve.core.types import (
    CompressionPlan,
    Constraint,
    ConstraintKind,
    Extent,
    FinishReason,
    FrameTimes,
    Manifest,
    MediaInput,
    MediaSegment,
    MethodSpec,
    Payload,
    PrefillReport,
    Prompt,
    Request,
    Reservation,
    SamplingParams,
    TextSegment,
    TokenLogprobs,
    TokenOutput,
    WorkerStats,
)
from prismserve.protocol import convert
from prismserve.protocol import worker_pb2 as pb

KEY = bytes(range(32))
SPEC = MethodSpec("visionzip", (("contextual", 0.15625), ("keep", 64), ("merge", "sum"), ("none", None), ("on", True)))


VIDEO = MediaInput(bytes(range(18)), KEY, 3, 1, FrameTimes((0.0, 0.1), 4.5))
LOGPROBS = (TokenLogprobs(-0.5, ((5, -0.5), (2, -1.25))), TokenLogprobs(-9999.0))


def request() -> Request:
    return Request(
        request_id="r-1",
        attempt=2,
        namespace=KEY,
        wire_namespace=KEY[::-1],
        prompt=Prompt(
            (
                TextSegment((4,)),
                MediaSegment(0, KEY, 49, 196, 14),
                MediaSegment(1, KEY, 8, 8, 2, 50),
                TextSegment((7, 8, 5)),
            )
        ),
        media=(MediaInput(b"png", KEY, 224, 200), VIDEO),
        sampling=SamplingParams(
            max_tokens=9,
            temperature=0.5,
            stop=("a", "b"),
            stop_token_ids=(1, 2),
            seed=-3,
            logit_bias=((4, -100.0), (9, 0.7)),
            logprobs=0,
            constraint=Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}'),
        ),
        compression=CompressionPlan(SPEC, MethodSpec("int8"), "balanced"),
        resume_token_ids=(11, 12),
        priority=-1,
        timeout_s=12.5,
    )


def test_a_request_survives_the_wire() -> None:
    message = pb.Request.FromString(convert.request_to_proto(request()).SerializeToString())
    assert convert.request_from_proto(message) == request()


@pytest.mark.parametrize("changed", [{"data": bytes(17)}, {"height_px": 2}, {"times": FrameTimes((), 1.0)}])
def test_a_video_whose_samples_do_not_fill_its_frames_is_refused(changed) -> None:
    media = (replace(VIDEO, **changed), VIDEO)
    with pytest.raises(TransferError, match=r"a video of \d frames takes \d+ bytes, got"):
        convert.request_from_proto(convert.request_to_proto(replace(request(), media=media)))


def test_what_a_request_leaves_out_stays_out() -> None:
    plain = convert.sampling_from_proto(convert.sampling_to_proto(SamplingParams()))
    assert (plain.logit_bias, plain.logprobs, plain.constraint) == ((), None, None)


def test_an_unknown_kind_of_constraint_is_refused() -> None:
    message = convert.request_to_proto(request())
    message.sampling.constraint.kind = "haiku"
    with pytest.raises(TransferError, match="haiku"):
        convert.request_from_proto(message)


def test_logprobs_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(TransferError, match="2 tokens come with 1"):
        convert.logprobs_from_proto([pb.TokenLogprobs(top_token_ids=[1, 2], top_logprobs=[-1.0])])


def test_an_image_whose_tokens_have_a_position_each_stays_one() -> None:
    plain = replace(request(), prompt=Prompt((MediaSegment(0, KEY, 49, 196),)))
    message = pb.Request.FromString(convert.request_to_proto(plain).SerializeToString())
    assert convert.request_from_proto(message) == plain


def test_a_media_reference_out_of_range_is_refused() -> None:
    message = convert.request_to_proto(request())
    message.segments[1].media_index = 2
    with pytest.raises(TransferError, match="media 2 of 2"):
        convert.request_from_proto(message)


@pytest.mark.parametrize("field", ["namespace", "wire_namespace"])
def test_a_short_digest_is_refused(field: str) -> None:
    message = convert.request_to_proto(request())
    setattr(message, field, b"short")
    with pytest.raises(TransferError, match=field):
        convert.request_from_proto(message)


def test_outputs_and_reports_survive_the_wire() -> None:
    report = PrefillReport(worker_id="p", cached_tokens=3, encode_ms=1.5, kv_bytes_sent=9, transport="nixl")
    for reason in (None, *FinishReason):
        output = TokenOutput("r", 1, (5, 6), reason, "text", report, LOGPROBS)
        message = pb.TokenOutput.FromString(convert.token_output_to_proto(output).SerializeToString())
        assert convert.token_output_from_proto(message) == output
    assert convert.token_output_from_proto(pb.TokenOutput(request_id="r")).report is None


def test_an_unknown_finish_reason_is_refused() -> None:
    with pytest.raises(TransferError, match="finish_reason"):
        convert.token_output_from_proto(pb.TokenOutput(finish_reason="exploded"))


def test_stats_survive_the_wire_and_unknown_numbers_are_left_out() -> None:
    stats = WorkerStats(worker_id="w", waiting=3, transfer_seconds=0.25, step_ms=7.5)
    message = convert.stats_to_proto(stats, "ready")
    message.values["from_the_future"] = 1.0
    assert convert.stats_from_proto("w", message) == stats
    assert isinstance(convert.stats_from_proto("w", message).waiting, int)


def test_a_manifest_survives_the_wire() -> None:
    manifest = Manifest(
        "r", 1, "p-1", 7, KEY, KEY, MethodSpec("int8"), (60, 60), 207, (9,), (Payload(0, 0, 60, 64, 128, b"c" * 16),), 5
    )
    manifest = dataclasses.replace(manifest, first_logprobs=LOGPROBS[:1])
    message = pb.Manifest.FromString(convert.manifest_to_proto(manifest).SerializeToString())
    assert convert.manifest_from_proto(message) == manifest
    message.payloads[0].checksum = b"c"
    with pytest.raises(TransferError, match="checksum"):
        convert.manifest_from_proto(message)


def test_a_reservation_survives_the_wire() -> None:
    reservation = Reservation(5, Extent(1, 2, 3), 65536, 16, 30.0)
    assert convert.reservation_from_proto(convert.reservation_to_proto(reservation)) == reservation


def test_keys_are_joined_and_split() -> None:
    assert convert.split_keys(convert.join_keys([KEY, KEY[::-1]])) == (KEY, KEY[::-1])
    with pytest.raises(TransferError, match="multiple of 32"):
        convert.split_keys(b"123")


def test_every_field_of_the_core_type_is_in_its_message() -> None:
    for core, message in (
        (SamplingParams, pb.SamplingParams),
        (PrefillReport, pb.PrefillReport),
        (Manifest, pb.Manifest),
    ):
        assert {f.name for f in dataclasses.fields(core)} == set(message.DESCRIPTOR.fields_by_name)
