"""Pictures and videos that are meant to hurt are refused by their header and their number, at both doors."""

from __future__ import annotations

import io

import pytest
from PIL import Image, ImageFile

from prismserve.protocol import prismserve_pb2 as pb
from prismserve.router.image_header import read_header
from tests.router.scripted import png
from tests.router.test_media import BAD, crafted_jpeg, crafted_png, crafted_webp, encode
from tests.security.doors import bounded_memory, http, image, over_grpc, picture_request, serves_on, text, user

MANY = 10_000


def saved(kind, mode="RGB"):
    out = io.BytesIO()
    Image.new(mode, (40, 30)).save(out, kind)
    return out.getvalue()


HOSTILE = {
    **BAD,
    "png bomb of one colour": crafted_png(65_000, 65_000),
    "jpeg bomb at the limit of the format": crafted_jpeg(65_500, 65_500),
    "webp bomb at the limit of the format": crafted_webp(16_384, 16_384),
    "100000x1": crafted_png(100_000, 1),
    "negative size": crafted_png(0x7FFFFFFF, 0x7FFFFFFF),
    "html and png": b"<html><script>" + png(),
    "png and html": png() + b"<script>alert(1)</script>",
    "pdf": b"%PDF-1.7\n" + bytes(64),
    "ico": saved("ICO"),
    "ppm": saved("PPM"),
    "jpeg 2000": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(64),
    "avif": b"\x00\x00\x00\x1cftypavif" + bytes(64),
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
}


async def test_hostile_images_are_refused_at_both_doors_and_reach_no_worker(start_cluster):
    cluster = await start_cluster(("decode",))
    with bounded_memory():
        for name, data in HOSTILE.items():
            for answer in (
                await http(cluster, user(image(data), text("What is it?"))),
                await over_grpc(cluster, picture_request(data)),
            ):
                assert answer.status in (400, 413), (name, answer)
                assert answer.field.startswith("messages[0].content[0]"), (name, answer)
    assert cluster.workers["decode-0"].submits == []
    await serves_on(cluster)


def never(self):
    raise AssertionError("decoded")


async def test_bombs_are_refused_by_their_header_before_anything_is_decoded(start_cluster, monkeypatch):
    cluster = await start_cluster(("decode",))
    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    for name in (name for name in HOSTILE if "bomb" in name or "1" in name[:4]):
        assert (await http(cluster, user(image(HOSTILE[name])))).status in (400, 413), name
    assert cluster.service.status()["router"]["images_decoded"] == 0


async def test_a_jpeg_that_calls_itself_png_is_judged_by_its_bytes(start_cluster):
    cluster = await start_cluster(("decode",))
    data = encode("JPEG")
    assert read_header(data, "x").format == "JPEG"
    answer = await http(cluster, user(image(data, "image/png"), text("What is it?")))
    assert answer.status in (200, 400)
    await serves_on(cluster)


async def test_ten_thousand_images_or_frames_are_refused_before_any_is_decoded(start_cluster, monkeypatch):
    cluster = await start_cluster(("decode",))
    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    small = png(4, 4)
    frames = {"type": "video_url", "video_url": {"frames": [image(small)["image_url"]["url"]] * MANY}}
    video = pb.ContentPart(video=pb.Video(frames=[small] * MANY))
    with bounded_memory():
        for answer in (
            await http(cluster, user(*[image(small)] * MANY)),
            await over_grpc(cluster, picture_request(*[small] * MANY)),
            await http(cluster, user(frames)),
            await over_grpc(cluster, pb.GenerateRequest(messages=[pb.Message(role="user", content=[video])])),
        ):
            assert answer.status == 400
            assert answer.field.startswith("messages")
    router = cluster.service.status()["router"]
    assert (router["images_decoded"], router["videos_decoded"]) == (0, 0)
    monkeypatch.undo()
    await serves_on(cluster)


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_the_same_bytes_in_two_shapes_have_two_keys(start_cluster, door):
    cluster = await start_cluster(("mixed",))
    samples = bytes(range(250)) * 36
    keys, namespaces = [], []
    for size in ((30, 100), (100, 30)):
        out = io.BytesIO()
        Image.frombytes("RGB", size, samples).save(out, "PNG")
        if door == "http":
            answer = await http(cluster, user(image(out.getvalue()), text("What is it?")))
        else:
            answer = await over_grpc(cluster, picture_request(out.getvalue()))
        assert answer.status == 200
        request = cluster.workers["mixed-0"].submits[-1].request
        keys.append([segment.key for segment in request.segments if segment.is_media])
        namespaces.append(request.namespace)
    assert keys[0] != keys[1]
    assert namespaces[0] == namespaces[1]
