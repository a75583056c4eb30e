from __future__ import annotations

import pytest
import torch
import xxhash

from prismserve.kernels.copy_hashed import copy_hashed, native, reference
from prismserve.kernels.dispatch import use_native_on

IMPLEMENTATIONS = [reference.copy_hashed, native.copy_hashed, copy_hashed]
# Around XXH3's branches and blocks, the size from which stores pass the caches, and a piece of the reference.
SIZES = [0, 1, 17, 129, 240, 241, 256, 257, 1023, 1024, 1025, 1088, 2049, 10_000, 131_071, 131_072, 200_001, 300_000]


@pytest.fixture(params=IMPLEMENTATIONS, ids=["reference", "native", "dispatched"])
def implementation(request):
    if request.param is native.copy_hashed and not use_native_on(torch.device("cpu")):
        pytest.skip("there is no compiler")
    return request.param


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 1])
def test_bytes_are_copied_and_have_the_checksum_of_xxhash(implementation, size, offset):
    source = torch.randint(0, 256, (size + offset,), dtype=torch.uint8)[offset:]
    memory = torch.full((size + 64 + offset,), 7, dtype=torch.uint8)
    target = memory[offset : offset + size]
    expected = xxhash.xxh3_128_digest(source.numpy().data)
    assert implementation(source, target) == expected
    assert torch.equal(source, target)
    assert bool((memory[offset + size :] == 7).all())
    assert implementation(source, None) == expected


def test_a_flipped_bit_anywhere_is_seen(implementation):
    source = torch.zeros(5000, dtype=torch.uint8)
    seen = {implementation(source, None)}
    for at in (0, 63, 64, 1023, 1024, 4095, 4935, 4936, 4999):
        source[at] = 1
        seen.add(implementation(source, None))
        source[at] = 0
    assert len(seen) == 10


def test_what_is_no_row_of_bytes_is_refused(implementation):
    for source in (torch.zeros(4, 300, dtype=torch.uint8), torch.zeros(300), torch.zeros(600, dtype=torch.uint8)[::2]):
        with pytest.raises(ValueError, match="must be a contiguous uint8"):
            implementation(source, None)
    with pytest.raises(ValueError, match="300 bytes do not fit into 299"):
        implementation(torch.zeros(300, dtype=torch.uint8), torch.zeros(299, dtype=torch.uint8))
