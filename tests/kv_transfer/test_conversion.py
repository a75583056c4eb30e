"""Two sides with different layouts: what is converted, bit for bit or within the codec's bound, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kv_transfer_conftest import LAYOUT, expect, kv, spec

from prismserve.compression import loader
from prismserve.compression.wire import Slots, table
from prismserve.core.errors import IncompatibleLayoutError
from prismserve.core.types import KVLayout, MethodSpec
from prismserve.kv_transfer.conversion import Side, check_convertible, check_registered
from prismserve.kv_transfer.manifest import build, verify
from prismserve.kv_transfer.plan import reserve_bytes
from prismserve.kv_transfer.receiver import Receiver
from prismserve.kv_transfer.sender import Outgoing

TOKENS = 50


def wire(codec: str, **params) -> MethodSpec:
    return loader.normalise(loader.codec(codec), params, "compression.wire")


def check(source: KVLayout, target: KVLayout, codec: MethodSpec) -> None:
    check_convertible(Side("a", source), Side("b", target), codec)


def test_another_block_size_is_taken_over_under_every_codec():
    for codec in loader.names("codec"):
        check(LAYOUT, replace(LAYOUT, block_tokens=64), spec(codec))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_heads": 4}, r"kv_heads 2 and 4.*tensor-parallel"),
        ({"layers": 4}, "layers 3 and 4"),
        ({"head_dim": 32}, "head_dim 16 and 32"),
        ({"position_scheme": "none"}, "position_scheme 'rope' and 'none'"),
        ({"kv_heads": 4, "dtype": "bfloat16"}, "dtype 'float32' and 'bfloat16', kv_heads 2 and 4"),
    ],
)
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_what_cannot_be_converted_is_refused_with_both_sides_and_every_difference_named(change, said, codec):
    target = KVLayout(**{name: change.get(name, getattr(LAYOUT, name)) for name in KVLayout.__dataclass_fields__})
    with pytest.raises(IncompatibleLayoutError, match=f"worker a and worker b differ .*{said}"):
        check(LAYOUT, target, spec(codec))


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"kv_format": "int8"}])
def test_rounded_kv_is_taken_over_only_where_the_codec_gave_it_a_chain_of_its_own(change):
    target = replace(LAYOUT, **change)
    with pytest.raises(IncompatibleLayoutError, match=r"worker a and worker b.*codec none promises the same bytes"):
        check(LAYOUT, target, spec("none"))
    check(LAYOUT, target, spec("int8"))
    check(LAYOUT, target, wire("int4", text="none", residual=16))


def test_rows_of_a_quantised_pool_are_not_taken_for_numbers():
    source = replace(LAYOUT, kv_format="int8")
    with pytest.raises(IncompatibleLayoutError, match=r"set wire\.text same and residual 0"):
        check(source, LAYOUT, wire("int4", text="same", residual=16))
    check(source, LAYOUT, wire("int4", text="same", residual=0))
    check(source, replace(source, dtype="bfloat16"), wire("int4", text="same", residual=16))


def test_a_worker_that_names_another_layout_than_it_is_registered_with_is_refused():
    check_registered(Side("a", LAYOUT), LAYOUT.fingerprint())
    with pytest.raises(IncompatibleLayoutError, match="worker a names another KV layout"):
        check_registered(Side("a", LAYOUT), bytes(32))


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        (spec("none"), "float32"),
        (spec("int8"), "bfloat16"),
        (wire("int4", text="same", residual=16), "bfloat16"),
    ],
)
def test_kv_of_another_layout_arrives_in_the_receivers(make_worker, codec, dtype):
    sender, receiver = make_worker("a"), make_worker("b")
    target = replace(LAYOUT, block_tokens=64, dtype=dtype)
    taking = Receiver(receiver.hub, target)
    receiver.receiver.close()
    receiver.receiver = taking
    expected = replace(expect(tokens=TOKENS), codec=codec, source_layout=LAYOUT)
    reservation = taking.reserve(expected, reserve_bytes(TOKENS, codec, LAYOUT), receiver.sink)
    outgoing = Outgoing(sender.hub, receiver.info, reservation, codec, LAYOUT, Slots(TOKENS))
    keys, values = kv(3, TOKENS)
    for layer in range(LAYOUT.layers):
        outgoing.push(layer, 0, keys[layer], values[layer])
    payloads = outgoing.finish(10)
    manifest = build(expected, LAYOUT, payloads, layer_tokens=(TOKENS,) * LAYOUT.layers, next_position=TOKENS)
    taking.commit(reservation.lease_id, reservation.extent.generation, manifest).result(10)
    for piece in payloads:
        run = slice(piece.start_token, piece.start_token + piece.tokens)
        used = table(codec)[piece.codec]
        method, config = loader.codec(used.name), loader.config_of(used, "codec")
        encoded = method.encode(keys[piece.layer, run], values[piece.layer, run], config)
        sent = method.decode(encoded, piece.tokens, LAYOUT, config)
        for side, original in zip(receiver.got.pop((piece.layer, piece.start_token)), sent, strict=True):
            assert side.dtype is getattr(torch, dtype)
            assert torch.equal(side, original.to(side.dtype))
    assert not receiver.got
    assert sum(piece.tokens for piece in payloads) == TOKENS * LAYOUT.layers


def test_a_manifest_of_another_layout_than_was_reserved_for_is_refused():
    other = replace(LAYOUT, block_tokens=64)
    expected = replace(expect(tokens=TOKENS), source_layout=other)
    manifest = build(expected, LAYOUT, (), layer_tokens=(TOKENS,) * LAYOUT.layers, next_position=TOKENS)
    with pytest.raises(IncompatibleLayoutError, match=r"worker a.*this worker"):
        verify(manifest, expected, LAYOUT, 1 << 20)
