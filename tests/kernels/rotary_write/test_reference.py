from __future__ import annotations

import torch

from prismserve.kernels.paged_cache import write_kv
from prismserve.kernels.rotary import apply_rotary, rotary_angles
from prismserve.kernels.rotary_write import rotary_write


def test_equals_rotation_then_write():
    qkv = torch.randn(3, 8, 16).split((4, 2, 2), dim=1)
    angles = rotary_angles(torch.tensor([0, 5, 9]), torch.rand(8))
    slots = torch.tensor([7, 0, 4])
    fused, separate = torch.zeros(2, 2, 2, 4, 2, 16)
    q = rotary_write(qkv, *angles, fused, slots)
    write_kv(separate, slots, apply_rotary(qkv[1], *angles), qkv[2])
    assert torch.equal(q, apply_rotary(qkv[0], *angles))
    assert torch.equal(fused, separate)
