"""Compile every kernel for a GPU that need not be there: ``python -m tests.kernels.compile_all 90``.

The interpreter accepts what the compiler refuses (types that differ between branches, annotations, loop-carried
types). Launches are turned into compilations for the compute capability given; nothing runs.
"""

from __future__ import annotations

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from prismserve.kernels import paged_attention
from prismserve.kernels.dispatch import _choice
from prismserve.kernels.paged_cache import KVFormat, new_quantised_layer
from prismserve.kernels.score_rows import plan_rows, score_rows
from tests.kernels import cases


class NoDevice:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


def main():
    capability = int(sys.argv[1])
    driver.set_active(NoDevice(capability))
    launch = JITFunction.run
    compiled = set()

    def compile_only(self, *args, warmup, **kwargs):
        result = launch(self, *args, warmup=True, **kwargs)
        assert result.asm["cubin"]
        compiled.add(self.__name__)
        return result

    JITFunction.run = compile_only
    # Nothing has run, so results are not compared.
    cases.close = cases.compare_layers = cases.compare_codes = lambda *_args, **_kwargs: None
    _choice.interpreted = True
    dtype = torch.bfloat16
    for kv_format in (None, *KVFormat):
        layer = torch.zeros(8, 2, 16, 2, 128, dtype=dtype)
        if kv_format is not None:
            layer = new_quantised_layer(kv_format, (8, 16, 2, 128), scale_dtype=torch.float16)
        q = torch.zeros(101, 8, 128, dtype=dtype)
        step = paged_attention.plan_batch([[1], list(range(8))], [1, 100], [9, 120], 16)
        paged_attention.attend_with_lse(q, layer, step, 0.1)
        score_rows(q[:3], layer, plan_rows([[1], [2]], [[3], [4, 5]], 16), 0.1)
        cases.check_decode("cpu", 8, 2, 80, [5, 0], kv_format=kv_format, splits=4, dtype=dtype)
        cases.check_rotary_write("cpu", 8, 2, 128, 3, kv_format=kv_format, dtype=dtype)
        cases.check_write("cpu", 2, 128, 3, kv_format=kv_format, dtype=dtype)
    cases.check_quantised("cpu", (70, 8, 128), 32, dtype)
    cases.check_elementwise("cpu", 3, 4096, dtype)
    from prismserve.kernels.block_copy import triton as copy
    from prismserve.kernels.topk_gather import triton as select

    pool, groups = torch.zeros(4, 2, 16, dtype=dtype), torch.tensor([1, 2])
    copy.scatter_blocks(pool, groups, copy.gather_blocks(pool, groups))
    select.top_k(torch.zeros(2, 9000), 10)
    select.gather_tokens(torch.zeros(5, 2, 8), torch.zeros(2, 3, dtype=torch.int64))
    sys.stdout.write(" ".join(sorted(compiled)))


if __name__ == "__main__":
    main()
