from __future__ import annotations

import pytest
import torch

from prismserve.kernels.paged_attention import paged_attention
from prismserve.kernels.paged_cache import (
    KVFormat,
    QuantisedLayer,
    by_slot,
    new_quantised_layer,
    read_blocks,
    slot_blocks,
    write_kv,
)

ERROR = {KVFormat.INT8: 0.02, KVFormat.INT4: 0.3, KVFormat.FP8: 0.3}


@pytest.mark.parametrize("kv_format", list(KVFormat))
def test_what_is_written_is_read_back_within_the_format_s_error(kv_format):
    layer = new_quantised_layer(kv_format, (5, 4, 2, 16))
    assert layer.head_dim == 16
    slots = torch.tensor([3, 17, 8])
    keys, values = torch.randn(2, 3, 2, 16)
    write_kv(layer, slots, keys, values)
    for side, rows in zip(read_blocks(layer, torch.arange(5)), (keys, values), strict=True):
        assert (side.flatten(0, 1)[slots] - rows).abs().max() < ERROR[kv_format]
        assert torch.count_nonzero(side.flatten(0, 1).abs().sum((1, 2))) == 3


@pytest.mark.parametrize("kv_format", list(KVFormat))
def test_attention_over_a_quantised_layer_is_attention_over_what_it_restores(kv_format):
    layer = new_quantised_layer(kv_format, (8, 4, 2, 16))
    write_kv(layer, torch.arange(32), *torch.randn(2, 32, 2, 16))
    restored = torch.stack(read_blocks(layer, torch.arange(8)), dim=1)
    q = torch.randn(4, 4, 16)
    step = ([[1, 2], [7, 3, 0]], [1, 3], [6, 11], 0.25)
    torch.testing.assert_close(paged_attention(q, layer, *step), paged_attention(q, restored, *step))


@pytest.mark.parametrize("kv_format", [None, *KVFormat])
def test_blocks_of_one_slot_show_the_same_memory(kv_format):
    groups, layers, size = 5, 3, 4
    if kv_format is None:
        layer = torch.zeros(groups, layers, 2, size, 2, 16)[:, 1]
    else:
        whole = new_quantised_layer(kv_format, (groups * layers, size, 2, 16))

        def one(part):
            return part.view(groups, layers, *part.shape[1:])[:, 1]

        offset = None if whole.offset is None else one(whole.offset)
        layer = QuantisedLayer(kv_format, one(whole.codes), one(whole.scale), offset)
    write_kv(layer, torch.arange(groups * size), *torch.randn(2, groups * size, 2, 16))
    slots = [18, 0, 7, 12, 3]
    kept = read_blocks(by_slot(layer), torch.tensor(slot_blocks(layer, slots)))
    for side, whole_side in zip(kept, read_blocks(layer, torch.arange(groups)), strict=True):
        assert torch.equal(side.flatten(0, 1), whole_side.flatten(0, 1)[slots])
    q, among = torch.randn(1, 4, 16), torch.stack(kept, dim=1)
    singly = paged_attention(q, by_slot(layer), [slot_blocks(layer, slots)], [1], [5], 0.25)
    torch.testing.assert_close(singly, paged_attention(q, among, [list(range(5))], [1], [5], 0.25))


def test_groups_that_do_not_hold_whole_slots_are_refused():
    apart = torch.zeros(100).as_strided((2, 2, 3, 1, 4), (27, 12, 4, 4, 1))
    with pytest.raises(ValueError, match="27 elements apart"):
        by_slot(apart)
