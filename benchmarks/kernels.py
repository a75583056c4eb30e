"""Speed of the attention kernels on a GPU, beside the device's own limits and flash-attn.

    python -m benchmarks.kernels [--out FILE]

Prints three markdown tables: the part of the measured memory bandwidth that decode attention reaches (batch 1 to 128,
context 8k and more), prefill in TFLOP/s beside flash-attn (if installed) and PyTorch's SDPA, and decode over fp8, int8
and int4 caches as a multiple of bfloat16 at 32k. Needs a CUDA device and Triton.

Bytes are counted as keys and values (and scales) read once; FLOPs as ``4 * H * d`` for every (query, visible key).
Times are medians; the level-two cache is overwritten before every run. Every kernel's output is compared with the
reference, on the first sequence, before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from torch.nn import functional

from prismserve.kernels import paged_decode
from prismserve.kernels.dispatch import triton_installed
from prismserve.kernels.paged_cache import KVFormat, LayerKV, QuantisedLayer, new_quantised_layer, write_kv
from prismserve.kernels.paged_prefill import plan_ragged

HEADS: Final = 32
KV_HEADS: Final = 8
HEAD_DIM: Final = 128
BLOCK_TOKENS: Final = 16
SCALE: Final = HEAD_DIM**-0.5
FLUSH_BYTES: Final = 512 << 20
CACHE_BYTES_MAX: Final = 24 << 30
TOLERANCE: Final = 2e-2
REPEATS: Final = 30


def time_s(run: Callable[[], object]) -> float:
    """Median seconds of a run on an idle device with a cold level-two cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes per second of a large device copy, reads and writes together: what memory gives at best."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_s(lambda: target.copy_(source))


def make_layer(kv_format: KVFormat | None, groups: int) -> LayerKV:
    """A cache layer full of random rows."""
    if kv_format is None:
        return torch.randn(groups, 2, BLOCK_TOKENS, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    shape = (groups, BLOCK_TOKENS, KV_HEADS, HEAD_DIM)
    layer = new_quantised_layer(kv_format, shape, device="cuda", scale_dtype=torch.float16)
    step = 1 << 16
    for first in range(0, groups * BLOCK_TOKENS, step):
        slots = torch.arange(first, min(first + step, groups * BLOCK_TOKENS), device="cuda")
        rows = torch.randn(2, slots.shape[0], KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        write_kv(layer, slots, rows[0], rows[1])
    return layer


def row_bytes(layer: LayerKV) -> float:
    """Bytes of keys and values of one token."""
    if not isinstance(layer, QuantisedLayer):
        return 2 * KV_HEADS * HEAD_DIM * layer.element_size()
    scales = layer.scale.element_size() * (1 if layer.offset is None else 2)
    return 2 * KV_HEADS * (layer.codes.shape[-1] + scales)


def time_decode(kv_format: KVFormat | None, batch: int, context: int) -> tuple[float, float]:
    """Seconds of one layer's decode attention, and the bytes of cache it reads.

    Raises:
        RuntimeError: the result is not that of the reference.
    """
    blocks = context // BLOCK_TOKENS
    layer = make_layer(kv_format, batch * blocks)
    tables = torch.randperm(batch * blocks, device="cuda").to(torch.int32).view(batch, blocks)
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    q = torch.randn(batch, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    out, _ = paged_decode.paged_decode(q, layer, tables, lens, SCALE)
    expected, _ = paged_decode.reference.paged_decode(q[:1], layer, tables[:1], lens[:1], SCALE)
    check(out[:1], expected)
    seconds = time_s(lambda: paged_decode.paged_decode(q, layer, tables, lens, SCALE))
    return seconds, batch * context * row_bytes(layer)


def check(got: torch.Tensor, expected: torch.Tensor) -> None:
    """RuntimeError if a kernel is wrong: its speed would mean nothing."""
    off = (got.float() - expected.float()).abs().max().item()
    if not off <= TOLERANCE:
        message = f"a kernel differs from its reference by {off:.3g}, more than {TOLERANCE}"
        raise RuntimeError(message)


def decode_table(bandwidth: float) -> Iterator[str]:
    """Decode attention over bfloat16, as a part of the bandwidth."""
    yield f"Decode attention, bfloat16, {HEADS} heads, {KV_HEADS} KV heads, d {HEAD_DIM}; "
    yield f"measured memory bandwidth {bandwidth / 1e12:.2f} TB/s\n"
    yield "| batch | context | us | TB/s | of measured |\n|---|---|---|---|---|"
    for context in (8192, 32768):
        for batch in (1, 2, 4, 8, 16, 32, 64, 128):
            if batch * context * 4 * KV_HEADS * HEAD_DIM > CACHE_BYTES_MAX:
                continue
            seconds, moved = time_decode(None, batch, context)
            rate = moved / seconds
            yield f"| {batch} | {context} | {seconds * 1e6:.1f} | {rate / 1e12:.2f} | {rate / bandwidth:.0%} |"


def format_table() -> Iterator[str]:
    """Decode attention over quantised caches, as a multiple of bfloat16."""
    yield "\nDecode attention at 32k, times bfloat16\n"
    yield "| batch | " + " | ".join(kv_format.value for kv_format in KVFormat) + " |\n|---|---|---|---|"
    for batch in (1, 8, 32):
        plain, _ = time_decode(None, batch, 32768)
        ratios = [plain / time_decode(kv_format, batch, 32768)[0] for kv_format in KVFormat]
        yield f"| {batch} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |"


def prefill_table() -> Iterator[str]:
    """Causal prefill of one sequence beside the alternatives."""
    yield "\nCausal prefill, bfloat16, TFLOP/s (the paged op is what the engine calls; it may itself take flash-attn)\n"
    yield "| tokens | Triton, paged | flash-attn | SDPA |\n|---|---|---|---|"
    from prismserve.kernels.paged_prefill import triton as kernels

    for tokens in (1024, 4096, 16384):
        blocks = tokens // BLOCK_TOKENS
        layer = torch.randn(blocks, 2, BLOCK_TOKENS, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        batch = plan_ragged([list(range(blocks))], [0], [tokens], [tokens], BLOCK_TOKENS, "cuda")
        q = torch.randn(tokens, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        keys, values = (layer[:, side].flatten(0, 1) for side in (0, 1))
        heads_first = [side.transpose(0, 1)[None] for side in (q, keys, values)]

        def sdpa(inputs: list[torch.Tensor] = heads_first) -> torch.Tensor:
            return functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=SCALE, enable_gqa=True)

        check(kernels.paged_prefill(q, layer, batch, SCALE)[0], sdpa()[0].transpose(0, 1))
        work = 4 * HEADS * HEAD_DIM * tokens * (tokens + 1) / 2
        ours = work / time_s(lambda q=q, layer=layer, batch=batch: kernels.paged_prefill(q, layer, batch, SCALE))
        flash = flash_rate(q, keys, values, work)
        yield f"| {tokens} | {ours / 1e12:.0f} | {flash} | {work / time_s(sdpa) / 1e12:.0f} |"


def flash_rate(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, work: float) -> str:
    """TFLOP/s of flash-attn on contiguous keys, or why there is none."""
    if find_spec("flash_attn") is None:
        return "not installed"
    from flash_attn import flash_attn_func

    inputs = [side[None].contiguous() for side in (q, keys, values)]
    return f"{work / time_s(lambda: flash_attn_func(*inputs, softmax_scale=SCALE, causal=True)) / 1e12:.0f}"


def main() -> int:
    """Print the tables, and write them to a file if asked to."""
    parser = argparse.ArgumentParser(description="Attention kernels on a GPU.")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available() or not triton_installed():
        print("benchmarks.kernels measures Triton kernels: it needs a CUDA device and Triton (pip install triton).")
        return 1
    torch.manual_seed(0)
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n"]
    print(lines[0])
    for table in (decode_table(read_bandwidth()), format_table(), prefill_table()):
        for line in table:
            print(line, flush=True)
            lines.append(line)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
