from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from prismserve.core.errors import InvalidRequestError
from prismserve.router.config import RouterConfig
from prismserve.router.image_header import read_header
from prismserve.router.media import ImageSource, MediaReader, decode_data_uri, pixel_hash, read_image
from tests.router.scripted import png

CONFIG = RouterConfig()
FIELD = "messages[0].content[0].image_url.url"


def encode(kind, size=(40, 30), mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def crafted_png(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def crafted_jpeg(width, height):
    data = bytearray(encode("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def crafted_webp(width, height):
    body = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (width - 1).to_bytes(3, "little")
    body += (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def animated(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        *(("PNG", mode, {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"lossless": True}),
    ],
)
def test_good_images_are_read_with_their_size(kind, mode, options):
    item = read_image(encode(kind, mode=mode, **options), CONFIG, FIELD)
    assert (item.width_px, item.height_px) == (40, 30)
    assert len(item.pixel_hash) == 32


BAD = {
    "png bomb": crafted_png(50_000, 50_000),
    "jpeg bomb": crafted_jpeg(60_000, 60_000),
    "webp bomb": crafted_webp(16_000, 16_000),
    "1x1": encode("PNG", (1, 1)),
    "1x16000": crafted_png(1, 16_000),
    "2x16000": crafted_png(2, 16_000),
    "1x100000": crafted_png(1, 100_000),
    "zero": crafted_png(0, 0),
    "animated png": animated("PNG"),
    "animated webp": animated("WEBP"),
    "gif": animated("GIF"),
    "bmp": encode("BMP"),
    "tiff": encode("TIFF"),
    "text": b"hello",
    "empty": b"",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "png then zip": encode("PNG") + b"PK\x03\x04",
    "jpeg then zip": encode("JPEG") + b"PK\x03\x04",
    "webp then zip": encode("WEBP") + b"PK\x03\x04",
    "png claims more than it holds": crafted_png(100, 100),
    "16 bit grey": encode("PNG", mode="I;16"),
    "png magic only": b"\x89PNG\r\n\x1a\n",
    "jpeg magic only": b"\xff\xd8\xff",
    "webp magic only": b"RIFF\x04\0\0\0WEBP",
    "wrong checksum": encode("PNG").replace(b"IDAT", b"IDAT\x01", 1)[:-1],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_with_the_field_named(name):
    with pytest.raises(InvalidRequestError) as caught:
        read_image(BAD[name], CONFIG, FIELD)
    assert caught.value.field == FIELD
    assert FIELD in caught.value.message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_truncation_is_refused(kind):
    data = encode(kind)
    for length in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 1]:
        with pytest.raises(InvalidRequestError):
            read_image(data[:length], CONFIG, FIELD)


def test_bombs_are_refused_before_decoding(monkeypatch):
    def never(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    for name in ("png bomb", "jpeg bomb", "webp bomb", "1x100000", "animated png"):
        with pytest.raises(InvalidRequestError):
            read_image(BAD[name], CONFIG, FIELD)


def test_random_damage_never_raises_anything_else():
    generator = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "WEBP"):
        good = bytearray(encode(kind))
        for _ in range(150):
            data = bytearray(good)
            for at in generator.integers(0, len(data), 4):
                data[at] = generator.integers(0, 256)
            with contextlib.suppress(InvalidRequestError):
                read_image(bytes(data), CONFIG, FIELD)


def test_jpeg_followed_by_previews_or_padding_is_read():
    data = encode("JPEG")
    assert read_header(data + data, FIELD).format == "JPEG"
    assert read_header(data + b"\0" * 64, FIELD).width_px == 40


def test_same_bytes_in_another_shape_have_another_hash():
    pixels = bytes(range(250)) * 36
    one = Image.frombytes("RGB", (30, 100), pixels)
    other = Image.frombytes("RGB", (100, 30), pixels)
    assert pixel_hash(one) != pixel_hash(other)


def test_same_indices_under_another_palette_have_another_hash():
    one = Image.new("P", (4, 4), 1)
    other = one.copy()
    one.putpalette([0, 0, 0, 255, 0, 0])
    other.putpalette([0, 0, 0, 0, 255, 0])
    assert pixel_hash(one) != pixel_hash(other)


def test_same_pixels_in_another_lossless_file_have_the_same_hash():
    one = read_image(encode("PNG"), CONFIG, FIELD)
    other = read_image(encode("WEBP", lossless=True), CONFIG, FIELD)
    assert one.pixel_hash == other.pixel_hash


@pytest.mark.parametrize(
    "uri",
    [
        "http://169.254.169.254/x.png",
        "https://[::1]/x.png",
        "http://0x7f.1/",
        "file:///etc/passwd",
        "data:text/html;base64,AAAA",
        "data:image/png,AAAA",
        "data:image/png;base64,A",
        "data:image/png;base64,\u00e4",
        "",
    ],
)
def test_only_base64_image_data_uris_are_read(uri):
    with pytest.raises(InvalidRequestError):
        decode_data_uri(uri, FIELD)


async def test_too_many_images_are_refused_before_any_is_decoded():
    reader = MediaReader(RouterConfig(max_images=2))
    try:
        with pytest.raises(InvalidRequestError, match="at most 2 images"):
            await reader.read([ImageSource(png(), FIELD)] * 3)
        assert reader.decoded_images == 0
    finally:
        reader.close()


async def test_memory_of_hashes_is_bounded_and_gives_the_same_hash():
    reader = MediaReader(RouterConfig(image_hash_entries=2))
    try:
        first = await reader.read([ImageSource(png(seed=seed), FIELD) for seed in range(3)])
        again = await reader.read([ImageSource(png(seed=seed), FIELD) for seed in (2, 0)])
        assert again == (first[2], first[0])
        assert (reader.decoded_images, reader.remembered_images) == (4, 1)
    finally:
        reader.close()
