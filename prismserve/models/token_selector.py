"""FlexSelect's small selector beside a model: a Qwen2 decoder trained to rank visual tokens for a question.

Source: Zhang et al., "FlexSelect: Flexible Token Selection for Efficient Long Video Understanding", NeurIPS 2025
(arXiv:2506.00993), section 3.2; names and shapes are those of its published code (``Qwen2ModelForSelector``).

A checkpoint directory may hold a folder ``token_selector`` with ``config.json`` (of type ``qwen2``) and safetensors:

- ``embed_tokens.weight``, ``layers.<i>.*`` and ``norm.weight``: the decoder, over the vocabulary of the model it selects
  for. The code runs all layers but the last, whose queries and keys score; so do we.
- ``mm_projector.0.weight`` [width, C], ``mm_projector.2.weight`` [width, width] and their biases: from patches of the
  model's vision tower (C wide) into the selector.
- ``image_newline`` is not used: what it separates in the code are the rows of one frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from torch.nn import functional

from prismserve.core.errors import ModelLoadError
from prismserve.models.checkpoint import parse_config, read_json
from prismserve.models.config import DecoderConfig
from prismserve.models.decoder import Decoder
from prismserve.models.weights import load_weights, stored_tensors, weight_files

if TYPE_CHECKING:
    from pathlib import Path

FOLDER: Final = "token_selector"
NEED_SELECTOR: Final = "token_selector"
_TYPE: Final = "qwen2"
_ENTRY: Final = "mm_projector.0.weight"


def token_selector_directory(checkpoint: Path) -> Path | None:
    """The folder of a checkpoint's token selector, None if it has none."""
    folder = checkpoint / FOLDER
    return folder if folder.is_dir() else None


class TokenSelector:
    """A decoder of its own with a projector in front of it.

    Attributes:
        decoder: whose last layer's attention ranks.
    """

    def __init__(self, directory: Path, vocab_size: int, device: torch.device, dtype: torch.dtype) -> None:
        """Load the selector in ``directory``.

        Args:
            directory: the folder.
            vocab_size: token ids the selector must know.
            device: where it runs.
            dtype: it computes in.

        Raises:
            ModelLoadError: there is none, or a weight is missing or of another shape than ``config.json`` says.
        """
        raw = read_json(directory / "config.json")
        if raw.get("model_type") != _TYPE:
            message = (
                f"{directory} holds no token selector of type {_TYPE!r}, but one of type {raw.get('model_type')!r}"
            )
            raise ModelLoadError(message, field="model")
        config = DecoderConfig.from_hf(parse_config(directory / "config.json", raw), tie_word_embeddings=True)
        files = weight_files(directory)
        entry = stored_tensors(files).get(_ENTRY)
        if entry is None or len(entry.shape) != 2:
            message = f"{directory} lacks {_ENTRY}, which takes patches into the selector"
            raise ModelLoadError(message, field="model")
        if config.vocab_size < vocab_size:
            message = f"the selector in {directory} knows {config.vocab_size} tokens, the model has {vocab_size}"
            raise ModelLoadError(message, field="model")
        if config.windows:
            message = f"the selector in {directory} has sliding windows, which no selector has"
            raise ModelLoadError(message, field="model")
        self.decoder = Decoder(config, device, dtype)
        self._directory = directory
        self._first, self._second = (
            nn.Linear(inputs, config.hidden_size, device=device, dtype=dtype).requires_grad_(requires_grad=False)
            for inputs in (entry.shape[1], config.hidden_size)
        )
        targets = self.decoder.weight_targets()
        for number, linear in ((0, self._first), (2, self._second)):
            targets |= {f"mm_projector.{number}.weight": linear.weight, f"mm_projector.{number}.bias": linear.bias}
        load_weights(files, lambda name: name.removeprefix("model."), targets)

    @property
    def depth(self) -> float:
        """Depth of the last layer, as a share of all."""
        layers = self.decoder.config.layers
        return (layers - 0.5) / layers

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, C] patches of the vision tower to [n, width]; ModelLoadError if the tower is not the one it was made for."""
        width = self._first.in_features
        if tokens.shape[1] != width:
            message = f"the selector in {self._directory} reads patches {width} wide, the model's are {tokens.shape[1]}"
            raise ModelLoadError(message, field="model")
        entered = functional.gelu(self._first(tokens.to(self._first.weight)))
        projected: torch.Tensor = self._second(entered)
        return projected
