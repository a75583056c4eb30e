"""KV of one layout at a worker of another: what is converted on its way in, and what is refused. Pure.

Pieces are runs of cache slots, so the size of blocks never matters to them. Numbers can be rounded to another dtype, but
KV that was rounded is not the KV its key names: it may land only where the codec has given it a key chain of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch

from prismserve.compression import loader
from prismserve.compression.wire import table
from prismserve.core.errors import IncompatibleLayoutError
from prismserve.core.types import KVLayout, MethodSpec

_FREE: Final = frozenset({"block_tokens"})
"""Fields that mean nothing to a piece."""
_ROUNDED: Final = frozenset({"dtype", "kv_format"})
"""Fields that a piece of numbers can be converted between."""
_PARALLEL: Final = "kv_heads"


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """One worker and the layout of its KV."""

    worker_id: str
    layout: KVLayout


def differences(source: KVLayout, target: KVLayout) -> tuple[str, ...]:
    """Names of the fields in which two layouts differ, in the order of the type."""
    names = (field.name for field in dataclasses.fields(KVLayout))
    return tuple(name for name in names if getattr(source, name) != getattr(target, name))


def check_convertible(source: Side, target: Side, codec: MethodSpec) -> None:
    """Make sure that KV of ``source`` can be taken over by ``target`` under a normalised wire spec.

    Raises:
        IncompatibleLayoutError: it cannot; the message names both workers and every difference that matters.
    """
    found = set(differences(source.layout, target.layout)) - _FREE
    if found - _ROUNDED:
        hint = "; do both run the same model and tensor-parallel degree?" if _PARALLEL in found else ""
        raise refusal(source, target, f"only {_listed(_FREE | _ROUNDED)} can be converted{hint}")
    if not found:
        return
    if not loader.codec(codec.name).lossy:
        why = f"codec {codec.name} promises the same bytes; a lossy wire codec converts {_listed(_ROUNDED)}"
        raise refusal(source, target, why)
    exact = [spec.name for spec in table(codec) if not loader.codec(spec.name).lossy]
    if exact and "kv_format" in found and source.layout.quantised:
        why = (
            f"text or the last tokens would travel as {source.layout.kv_format} rows; set wire.text same and residual 0"
        )
        raise refusal(source, target, why)


def check_registered(side: Side, fingerprint: bytes) -> None:
    """IncompatibleLayoutError unless a worker's message names the layout with which it is registered."""
    if side.layout.fingerprint() != fingerprint:
        message = f"worker {side.worker_id} names another KV layout than it is registered with ({side.layout})"
        raise IncompatibleLayoutError(message, field="layout_fingerprint")


def refusal(source: Side, target: Side, why: str) -> IncompatibleLayoutError:
    """The error for two layouts that do not fit, with both sides named."""
    pairs = ", ".join(
        f"{name} {getattr(source.layout, name)!r} and {getattr(target.layout, name)!r}"
        for name in differences(source.layout, target.layout)
    )
    message = f"KV layouts of worker {source.worker_id} and worker {target.worker_id} differ ({pairs}): {why}"
    return IncompatibleLayoutError(message, field="layout_fingerprint")


def convert(tensor: torch.Tensor, source: KVLayout, target: KVLayout) -> torch.Tensor:
    """Decoded keys or values of ``source`` as ``target`` takes them.

    Args:
        tensor: [tokens, kv_heads, head_dim] in the source's dtype, or rows of codes where both sides have one format.
        source: the layout it was decoded by.
        target: the layout it is wanted in.

    Returns:
        The same in the target's dtype: rounded to nearest even where it is narrower, the tensor itself where it is equal.
    """
    if source.dtype == target.dtype or not tensor.is_floating_point():
        return tensor
    return tensor.to(getattr(torch, target.dtype))


def _listed(names: frozenset[str]) -> str:
    *most, last = sorted(names)
    return f"{', '.join(most)} and {last}" if most else last
