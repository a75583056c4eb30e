"""The page on the wire format says what the code does: names, numbers, caps, sizes."""

from __future__ import annotations

import re
from math import ceil
from pathlib import Path

import msgpack
import pytest
import torch

from prismserve.compression import loader
from prismserve.compression.codec._sections import SHORT_TOKENS
from prismserve.compression.wire import CODECS_MAX
from prismserve.core.types import MANIFEST_VERSION, KVLayout, Payload
from prismserve.kv_transfer import wire
from prismserve.kv_transfer.arena import ArenaIdentity
from prismserve.kv_transfer.node import NodeIdentity
from prismserve.kv_transfer.plan import PIECE_ALIGN_BYTES
from prismserve.kv_transfer.transports import base
from prismserve.kv_transfer.transports.local import LocalEndpoint
from prismserve.kv_transfer.transports.nccl import NcclEndpoint
from prismserve.kv_transfer.transports.nixl import NixlEndpoint
from prismserve.kv_transfer.transports.shm import ShmEndpoint
from prismserve.protocol import worker_pb2 as pb
from prismserve.protocol.channel import MAX_MESSAGE_BYTES, SECRET_HEADER

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "wire_format.md").read_text()
TEXT = " ".join(PAGE.split())
LAYOUT = KVLayout("float32", layers=1, kv_heads=2, head_dim=8, block_tokens=16)
OF_ROUTERS = {"Session", "Explain"}  # the page is about what workers say to each other
ENDPOINTS = {"local": LocalEndpoint, "nccl": NcclEndpoint, "nixl": NixlEndpoint, "shm": ShmEndpoint}


def section(heading: str) -> str:
    """What stands under a heading, up to the next one."""
    (body,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return str(body)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


MESSAGES = re.findall(r"^### `(\w+)`$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_has_the_fields_that_the_page_lists(name):
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", section(f"`{name}`"), re.MULTILINE)
    fields = getattr(pb, name).DESCRIPTOR.fields
    assert [(field, int(number)) for field, number in rows] == [(field.name, field.number) for field in fields]


def test_every_message_between_workers_is_on_the_page():
    methods = pb.DESCRIPTOR.services_by_name["Worker"].methods
    asked = {
        kind.name
        for method in methods
        if method.name not in OF_ROUTERS
        for kind in (method.input_type, method.output_type)
    }
    assert asked | {"Extent", "Manifest", "Payload"} == set(MESSAGES)


def test_versions_and_caps_are_those_of_the_code():
    for stated in (
        f"the metadata `{SECRET_HEADER}`",
        f"A message has at most {MAX_MESSAGE_BYTES} bytes",
        f"The version is {MANIFEST_VERSION}. A worker that reads another",
        f"array of at most {wire.NOTIFICATION_BYTES_MAX} bytes, announcing at most {wire.PAYLOADS_MAX} pieces",
        f"a msgpack map of at most {wire.ENDPOINT_BYTES_MAX} bytes",
        f"multiples of {PIECE_ALIGN_BYTES} bytes",
        f"a table of at most {CODECS_MAX}",
        f"{wire.CHECKSUM_BYTES} bytes, XXH3-128",
        f"Below {SHORT_TOKENS} tokens int8 and int4",
    ):
        assert stated in TEXT, stated


def test_notifications_are_the_arrays_that_the_page_lists():
    body = section("Notifications")
    fields = {
        int(kind): quoted(row) for kind, row in re.findall(r"^\| (\d) .*?\| (`version`.*?)\|$", body, re.MULTILINE)
    }
    payload = Payload(1, 2, 3, 4, 5, bytes(16), 2)
    arrays = (wire.encode_payloads(7, 8, [payload]), wire.encode_end(7, 8), wire.encode_probe())
    for kind, raw in enumerate(arrays, start=1):
        values = dict(zip(fields[kind], msgpack.unpackb(raw), strict=True))
        assert values["kind"] == kind
        assert f"The version is {values['version']}. A payload is an array too" in TEXT
        assert (values.get("lease_id", 7), values.get("generation", 8)) == (7, 8)
    (listed,) = re.findall(r"A payload is an array too: (.*?)\. A notification grants", TEXT)
    (array,) = msgpack.unpackb(arrays[0])[4]
    assert array == [getattr(payload, name) for name in quoted(listed)]


def test_endpoints_have_the_entries_that_the_page_lists():
    body = section("Endpoints")
    rows = {name: quoted(fields) for name, fields in re.findall(r"^\| `(\w+)` \| (.*?) \|$", body, re.MULTILINE)}
    assert sorted(rows) == list(base.names())
    for name, fields in rows.items():
        assert list(ENDPOINTS[name].model_fields) == fields, name
    (of_node, of_arena) = re.findall(r"`node` is (.*?); `arena` is (.*?)\.", " ".join(body.split()))[0]
    assert quoted(of_node) == list(NodeIdentity.model_fields)
    assert quoted(of_arena) == list(ArenaIdentity.model_fields)
    assert quoted(body.split("a map from")[0])[:4] == list(wire.Endpoint.model_fields)


@pytest.mark.parametrize("row", re.findall(r"^\| (`\w+`(?: below 32 tokens)?) \| (keys? .*?) \|$", PAGE, re.MULTILINE))
def test_codecs_write_sections_of_the_sizes_that_the_page_gives(row):
    name = quoted(row[0])[0]
    short = "below" in row[0]
    codec = loader.codec(name)
    config = loader.config_of(loader.normalise(codec, {}, "compression.wire"), "codec")
    for tokens in (1, SHORT_TOKENS - 1) if short else (SHORT_TOKENS, 100, 333):
        sizes = {"T": tokens, "H": LAYOUT.kv_heads, "D": LAYOUT.head_dim, "E": LAYOUT.dtype_bytes}
        (formula,) = re.findall(r"`G = (.*?)`", PAGE)
        least = getattr(config, "group_tokens", 1)
        sizes["G"] = eval(formula, {"ceil": ceil, "max": max}, {"T": tokens, "group_tokens": least})
        keys, values = torch.randn(2, tokens, LAYOUT.kv_heads, LAYOUT.head_dim)
        parts = codec.parts(keys, values, config)
        assert [part.nbytes for part in parts] == [eval(size, {}, sizes) for size in quoted(row[1])]
        assert sum(part.nbytes for part in parts) == codec.encoded_bytes(tokens, LAYOUT, config)


def test_every_codec_is_on_the_page():
    assert {quoted(name)[0] for name in re.findall(r"^\| (`\w+`.*?) \| keys? ", PAGE, re.MULTILINE)} == set(
        loader.names("codec")
    )


def test_the_layout_fingerprint_is_over_the_fields_that_the_page_lists():
    (listed,) = re.findall(r"The layout fingerprint is over (.*?)\.", TEXT)
    assert set(quoted(listed)) == set(KVLayout.__dataclass_fields__)
