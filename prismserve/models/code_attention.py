"""VQToken's attention over codes, trained with a model of its own and kept beside it.

Source: Zhang and Fu, "VQToken: Neural Discrete Token Representation Learning for Extreme Token Reduction in Video Large
Language Models", NeurIPS 2025 (arXiv:2503.16980), section 3; names and shapes are those of its published code (``VQAttn``).

A checkpoint directory may hold a folder ``vqtoken`` with safetensors, from the released checkpoint under its own names
(``model.cross_attention.`` may stand in front of them, and other weights beside them):

- ``to_q_proj.weight`` [D, P] and its bias: from a row of the map, the number of the code of each of a frame's P patches,
  to the decoder's width D.
- ``transformer_decoder.layers.<i>.*``: torch's ``TransformerDecoderLayer`` over D, with ``self_attn``, ``multihead_attn``,
  ``linear1``, ``linear2`` and three norms behind their additions.

``config.json`` holds what the code passes to its constructor, which no released file says: ``model_type`` ``vqtoken``,
``query_dim`` P, ``context_dim`` D, ``num_heads`` and ``num_layers`` (released: 729, 896, 8, 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from prismserve.core.errors import ModelLoadError
from prismserve.models.checkpoint import read_count, read_json
from prismserve.models.weights import load_weights, weight_files

if TYPE_CHECKING:
    from pathlib import Path

FOLDER: Final = "vqtoken"
NEED_CODE_ATTENTION: Final = "vqtoken"
_TYPE: Final = "vqtoken"
_FEED_FORWARD: Final = 2048
"""Width between ``linear1`` and ``linear2``: torch's default, which the code leaves."""


def code_attention_directory(checkpoint: Path) -> Path | None:
    """The folder of a checkpoint's attention over codes, None if it has none."""
    folder = checkpoint / FOLDER
    return folder if folder.is_dir() else None


class CodeAttention:
    """Makes decoder inputs of a video's codes and of the map that says where each lies. Float32."""

    def __init__(self, directory: Path, patches: int, width: int, device: torch.device) -> None:
        """Load the attention in ``directory``.

        Args:
            directory: the folder.
            patches: of one frame of the model, before pooling.
            width: of the model's decoder.
            device: where it runs.

        Raises:
            ModelLoadError: there is none, it was made for another model, or a weight is missing or of another shape than
                ``config.json`` says.
        """
        raw = read_json(directory / "config.json")
        if raw.get("model_type") != _TYPE:
            message = (
                f"{directory} holds no attention over codes of type {_TYPE!r}, but one of {raw.get('model_type')!r}"
            )
            raise ModelLoadError(message, field="model")
        rows, inner, heads, layers = (
            read_count(directory / "config.json", raw, name)
            for name in ("query_dim", "context_dim", "num_heads", "num_layers")
        )
        if inner % heads:
            message = f"{directory / 'config.json'}: context_dim {inner} is not divisible by num_heads {heads}"
            raise ModelLoadError(message, field="model")
        for what, wanted, given in (("patches a frame", rows, patches), ("wide decoder inputs", inner, width)):
            if wanted != given:
                message = f"the attention over codes in {directory} takes {wanted} {what}, the model's are {given}"
                raise ModelLoadError(message, field="model")
        with torch.device("meta"):
            module = _VQAttn(rows, inner, heads, layers)
        self._module = module.to_empty(device=device).eval().requires_grad_(requires_grad=False)
        load_weights(weight_files(directory), _renamed, dict(self._module.named_parameters()))

    def __call__(self, places: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Let each row of a map look at the codes.

        Args:
            places: [T, P] int64, the number of the code of each patch of T frames, T at most K.
            codes: [K, D] float32.

        Returns:
            [K, D] float32. The rows of the map are taken in turn until there are K, as the code does; equal rows give
            equal tokens.
        """
        turns = torch.arange(codes.shape[0], device=places.device) % places.shape[0]
        with torch.inference_mode():
            written: torch.Tensor = self._module(places[turns].float()[None], codes[None])[0]
        return written


class _VQAttn(nn.Module):
    """The published module, with its names."""

    def __init__(self, rows: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(width, heads, _FEED_FORWARD, dropout=0.0, batch_first=True)
        self.transformer_decoder = nn.TransformerDecoder(layer, layers)
        self.to_q_proj = nn.Linear(rows, width)

    def forward(self, places: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """[1, K, P] and [1, K, D] to [1, K, D]."""
        written: torch.Tensor = self.transformer_decoder(self.to_q_proj(places), codes)
        return written


def _renamed(name: str) -> str:
    return name.removeprefix("model.").removeprefix("cross_attention.")
