"""The shape of KV, and the namespaces its keys live in."""

from __future__ import annotations

from dataclasses import dataclass

from prismserve.core.hashing import DIGEST_BYTES, canonical_json, digest
from prismserve.core.types.compression import MethodSpec


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What makes KV bytes interchangeable between two workers.

    A block holds ``block_tokens`` tokens of one layer: K and V, each [block_tokens, kv_heads, head_dim].

    Attributes:
        dtype: of keys and values as attention and codecs see them.
        kv_format: how they lie in memory: ``plain`` in ``dtype``; ``fp8``, ``int8`` or ``int4`` as codes with a float16
            scale (for int4 also an offset) per token, head and side.
    """

    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    position_scheme: str = "rope"
    kv_format: str = "plain"

    @property
    def quantised(self) -> bool:
        """Whether keys and values lie in memory as codes."""
        return self.kv_format != "plain"

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element of ``dtype``."""
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes in memory of one row: the keys or the values of one token and head."""
        scale_bytes = 2
        return {
            "plain": self.head_dim * self.dtype_bytes,
            "fp8": self.head_dim + scale_bytes,
            "int8": self.head_dim + scale_bytes,
            "int4": self.head_dim // 2 + 2 * scale_bytes,
        }[self.kv_format]

    @property
    def token_layer_bytes(self) -> int:
        """Bytes in memory of K and V of one token in one layer."""
        return 2 * self.kv_heads * self.row_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes in memory of K and V of one token over all layers."""
        return self.layers * self.token_layer_bytes

    def fingerprint(self) -> bytes:
        """32 bytes; equal exactly when blocks may be exchanged."""
        return digest(
            "kv-layout",
            canonical_json(
                [
                    self.dtype,
                    self.layers,
                    self.kv_heads,
                    self.head_dim,
                    self.block_tokens,
                    self.position_scheme,
                    self.kv_format,
                ]
            ),
        )


def namespace(model_fingerprint: bytes, layout: KVLayout, tenant_salt: bytes) -> bytes:
    """The root of a request's block-key chain: model, KV layout and tenant."""
    if len(model_fingerprint) != DIGEST_BYTES:
        message = f"model_fingerprint must be {DIGEST_BYTES} bytes, got {len(model_fingerprint)}"
        raise ValueError(message)
    return digest("namespace", model_fingerprint, layout.fingerprint(), tenant_salt)


def prefill_namespace(root: bytes, method: MethodSpec) -> bytes:
    """The chain root of requests whose visual tokens a prefill method reduces inside the decoder.

    What such a request leaves in a cache is found by requests of the same plan only, whatever share code the method has.
    """
    return root if method.name == "none" else digest("namespace-prune", root, method.fingerprint())


def wire_namespace(root: bytes, codec: MethodSpec, *, lossy: bool) -> bytes:
    """The chain root for KV that crossed the wire under ``codec``."""
    return digest("namespace-wire", root, codec.fingerprint()) if lossy else root
