from __future__ import annotations

import pytest
import torch

from prismserve.kernels.paged_attention import paged_attention
from prismserve.kernels.paged_cache import KVFormat, new_quantised_layer, read_blocks, write_kv

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
