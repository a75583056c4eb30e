from __future__ import annotations

import base64
import io
import json

import PIL.Image
import pytest

from prismserve.client import GenerateOptions, Image, Message, RequestError, Video
from prismserve.client.content import IMAGE_BYTES_MAX
from prismserve.client.requests import SAMPLING_FIELDS, build_request
from prismserve.protocol import prismserve_pb2 as pb


def png(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), colour).save(stream, format="PNG")
    return stream.getvalue()


def kinds(message: pb.Message) -> list[str | None]:
    return [part.WhichOneof("part") for part in message.content]


def test_a_question_becomes_one_user_turn_with_the_images_before_the_text() -> None:
    request = build_request("What is it?", {"images": [png(), png("blue")]})
    (message,) = request.messages
    assert message.role == "user"
    assert kinds(message) == ["image", "image", "text"]
    assert message.content[1].image == png("blue")
    assert message.content[2].text == "What is it?"


def test_path_bytes_and_pil_images_send_the_same_pixels(tmp_path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    opened = PIL.Image.open(io.BytesIO(png()))
    request = build_request("q", {"images": [path, str(path), png(), opened]})
    sent = [PIL.Image.open(io.BytesIO(part.image)).tobytes() for part in request.messages[0].content[:4]]
    assert len(set(sent)) == 1
    assert request.messages[0].content[0].image == png()


def test_images_go_to_the_last_user_turn_of_a_conversation() -> None:
    turns = [Message("user", "hi"), Message("assistant", "hello"), Message("user", "and this?")]
    request = build_request(turns, {"images": [png()]})
    assert [kinds(message) for message in request.messages] == [["text"], ["text"], ["image", "text"]]


def test_openai_style_messages_give_the_same_request_as_typed_ones() -> None:
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    theirs = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "q"}]},
    ]
    ours = [Message("system", "be brief"), Message("user", [Image(png()), "q"])]
    assert build_request(theirs, {}) == build_request(ours, {})


def test_only_the_sampling_parameters_that_were_given_are_on_the_wire() -> None:
    sampling = build_request("q", {"temperature": 0.0, "max_tokens": 7, "stop": "x", "stop_token_ids": [1, 2]}).sampling
    assert {field.name for field, _ in sampling.ListFields()} == {"temperature", "max_tokens", "stop", "stop_token_ids"}
    assert sampling.stop == ["x"]
    assert not sampling.HasField("seed")


def test_a_schema_is_sent_as_json_in_its_own_order_and_text_as_it_is() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    sent = build_request("q", {"json_schema": schema, "logit_bias": {5: -1.5}, "n": 2, "logprobs": 0}).sampling
    assert sent.json_schema == '{"type":"object","properties":{"b":{},"a":{}}}'
    assert dict(sent.logit_bias) == {5: -1.5}
    assert (sent.n, sent.logprobs, sent.HasField("logprobs")) == (2, 0, True)
    assert build_request("q", {"json_schema": '{"a": 1}'}).sampling.json_schema == '{"a": 1}'
    assert build_request("q", {"choice": ["yes", "no"]}).sampling.choice == ["yes", "no"]


def test_every_sampling_field_of_the_schema_is_an_option() -> None:
    assert set(GenerateOptions.__annotations__) >= SAMPLING_FIELDS


def test_a_plan_is_sent_as_canonical_json_and_a_name_as_it_is() -> None:
    assert build_request("q", {"compression": "off"}).compression == "off"
    plan = {"wire": {"codec": "int8"}, "visual": {"method": "visionzip", "keep": 64}}
    sent = build_request("q", {"compression": plan}).compression
    assert json.loads(sent) == plan
    assert sent.startswith('{"visual"')


@pytest.mark.parametrize(
    ("conversation", "options", "field"),
    [
        (None, {}, "messages"),
        ("q", {"prompt": "p"}, "messages"),
        ([], {}, "messages"),
        (None, {"prompt": "p", "images": [b"x"]}, "images"),
        ("q", {"images": "a.png"}, "images"),
        ("q", {"images": [b""]}, "images[0]"),
        ("q", {"images": ["/no/such/file.png"]}, "images[0]"),
        ("q", {"images": [3]}, "images[0]"),
        ([Message("assistant", "a")], {"images": [b"x"]}, "images"),
        ([{"role": "user"}], {}, "messages[0]"),
        ([{"role": "user", "content": "q", "name": "n"}], {}, "messages[0]"),
        ([{"role": "", "content": "q"}], {}, "messages[0].role"),
        ([{"role": "user", "content": 3}], {}, "messages[0].content"),
        ([{"role": "user", "content": [3]}], {}, "messages[0].content[0]"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}],
            {},
            "messages[0].content[0].image_url.url",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x;base64,@@"}}]}],
            {},
            "messages[0].content[0].image_url.url",
        ),
        ("q", {"max_tokens": -1}, "max_tokens"),
        ("q", {"max_tokens": 1 << 40}, "max_tokens"),
        ("q", {"temperature": "warm"}, "temperature"),
        ("q", {"seed": 1 << 70}, "seed"),
        ("q", {"stop_token_ids": [-1]}, "stop_token_ids"),
        ("q", {"compression": {"keep": float("nan")}}, "compression"),
        ("q", {"compression": {"keep": object()}}, "compression"),
        ("q", {"logit_bias": {-1: 1.0}}, "logit_bias"),
        ("q", {"logit_bias": [1]}, "logit_bias"),
        ("q", {"n": -1}, "n"),
        ("q", {"json_schema": {"const": float("nan")}}, "json_schema"),
        ("q", {"regex": "a", "grammar": "b"}, "grammar"),
        ("q", {"max_token": 3}, "max_token"),
    ],
)
def test_a_malformed_request_is_refused_before_it_is_sent_and_names_the_field(conversation, options, field) -> None:
    with pytest.raises(RequestError) as caught:
        build_request(conversation, options)
    assert caught.value.field == field
    assert field in caught.value.message


def test_an_image_over_the_limit_is_refused() -> None:
    with pytest.raises(RequestError, match="limit"):
        build_request("q", {"images": [bytes(IMAGE_BYTES_MAX + 1)]})


def test_videos_are_files_or_frames_with_their_options(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"file")
    videos = [path, Video([b"one", b"two"], fps=2), Video(b"webm", num_frames=3)]
    request = build_request("What moves?", {"images": [b"png"], "videos": videos})
    parts = request.messages[0].content
    assert [part.WhichOneof("part") for part in parts] == ["image", "video", "video", "video", "text"]
    file, frames, counted = (part.video for part in parts[1:4])
    assert (file.file, file.HasField("fps")) == (b"file", False)
    assert (list(frames.frames), frames.fps) == ([b"one", b"two"], 2)
    assert (counted.file, counted.num_frames) == (b"webm", 3)


@pytest.mark.parametrize(
    ("videos", "field"),
    [
        ("clip.mp4", "videos"),
        ([b""], "videos[0]"),
        ([[]], "videos[0]"),
        ([Video(b"x", fps="a")], "videos[0]"),
        ([3], "videos[0]"),
    ],
)
def test_a_video_that_cannot_be_sent_is_refused_by_field(videos, field):
    with pytest.raises(RequestError) as caught:
        build_request("What moves?", {"videos": videos})
    assert caught.value.field == field
