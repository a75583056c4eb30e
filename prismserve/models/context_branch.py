"""LLaMA-VID's text-guided branch, trained with models of its own and kept beside one.

Source: Li et al., "LLaMA-VID: An Image is Worth 2 Tokens in Large Language Models", ECCV 2024 (arXiv:2311.17043), section 3;
names and shapes are those of its published code (``vlm_att_*``).

A checkpoint directory may hold a folder ``llamavid`` with what a released checkpoint has of the branch:

- safetensors under the released names (``model.`` may stand in front of them, and other weights beside them):
  ``vlm_att_encoder.bert.*``, a Q-Former that reads the question and the C wide patches of the tower, class token included;
  ``vlm_att_query`` [1, Q, B]; ``vlm_att_ln`` over C; ``vlm_att_projector`` [C, B], ``vlm_att_key_projector`` [C, C] and
  ``vlm_att_val_projector`` [D, C] with their biases, D the width of the model's decoder.
- ``config.json``, the released one: ``bert_type`` (with ``qformer_pretrain``, as all released have), ``num_query`` Q,
  ``mm_hidden_size`` C and ``hidden_size`` D. The Q-Former has the sizes of ``bert-base-uncased``, which the code takes from
  there, unless ``qformer_config`` names others as transformers does for InstructBLIP.
- the tokenizer of ``bert-base-uncased``.

The released files are pickles of a model in LLaVA's own layout, so they must be converted first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from prismserve.core.errors import ModelLoadError
from prismserve.models.checkpoint import parse_config, read_count, read_json
from prismserve.models.weights import load_weights, stored_tensors, weight_files

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FOLDER: Final = "llamavid"
NEED_CONTEXT: Final = "llamavid"
_BERT_TYPES: Final = ("qformer_pretrain", "qformer_pretrain_freeze", "qformer_pretrain_freeze_all")
_ENCODER: Final = "vlm_att_encoder.bert."
_VOCABULARY: Final = f"{_ENCODER}embeddings.word_embeddings.weight"
_SIZES: Final = ("num_query", "mm_hidden_size", "hidden_size")
_TEXT_TOKENS_MAX: Final = 256
"""Of a longer question the code reads the end."""


def context_branch_directory(checkpoint: Path) -> Path | None:
    """The folder of a checkpoint's text-guided branch, None if it has none."""
    folder = checkpoint / FOLDER
    return folder if folder.is_dir() else None


class ContextBranch:
    """Looks at frames for a question, and makes one decoder input of what it finds in each. Float32; not thread-safe."""

    def __init__(self, directory: Path, decoder_width: int, device: torch.device) -> None:
        """Load the branch in ``directory``.

        Args:
            directory: the folder.
            decoder_width: of the model's decoder inputs.
            device: where it runs.

        Raises:
            ModelLoadError: there is none, it is of a kind that no released checkpoint has, it was made for another model,
                or a weight is missing or of another shape than ``config.json`` says.
        """
        # Imported here: processors and routers read configurations without paying for the model code.
        from transformers.initialization import no_init_weights
        from transformers.models.auto.tokenization_auto import AutoTokenizer

        raw = read_json(directory / "config.json")
        if raw.get("bert_type") not in _BERT_TYPES:
            message = (
                f"{directory} holds a branch of bert_type {raw.get('bert_type')!r}; supported: {', '.join(_BERT_TYPES)}"
            )
            raise ModelLoadError(message, field="model")
        queries, self._width, inputs = (read_count(directory / "config.json", raw, name) for name in _SIZES)
        if inputs != decoder_width:
            message = f"the branch in {directory} gives decoder inputs {inputs} wide, the model's are {decoder_width}"
            raise ModelLoadError(message, field="model")
        files = weight_files(directory)
        words = {_released(name): tensor.shape for name, tensor in stored_tensors(files).items()}.get(_VOCABULARY)
        if words is None or len(words) != 2:
            message = f"{directory} lacks {_VOCABULARY}, which takes the question into the branch"
            raise ModelLoadError(message, field="model")
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, truncation_side="left")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"the tokenizer in {directory} cannot be loaded: {error}"
            raise ModelLoadError(message, field="model") from error
        if len(tokenizer) > words[0]:
            message = f"the branch in {directory} knows {words[0]} tokens, its tokenizer has {len(tokenizer)}"
            raise ModelLoadError(message, field="model")
        with no_init_weights(), torch.device(device):
            module = _Branch(_qformer_config(directory, raw, words[0], self._width), queries, decoder_width)
        load_weights(files, _released, {_published(name): tensor for name, tensor in module.named_parameters()})
        self._module = module.eval().requires_grad_(requires_grad=False)
        self._tokenizer: Any = tokenizer
        self._device = device
        self._directory = directory

    def guide(self, text: str, patches: torch.Tensor, class_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a question finds in each of T frames.

        Args:
            text: the question; may be empty.
            patches: [T, n, C] of the vision tower.
            class_tokens: [T, C], what it gives beside them.

        Returns:
            [T, n] float32, how much each patch counts, of sum 1 in a frame; and [T, D] float32, a decoder input for each.

        Raises:
            ModelLoadError: the tower is not the one the branch was made for.
        """
        if patches.shape[-1] != self._width:
            message = (
                f"the branch in {self._directory} reads patches {self._width} wide, the model's are {patches.shape[-1]}"
            )
            raise ModelLoadError(message, field="model")
        limits = {"truncation": True, "max_length": _TEXT_TOKENS_MAX}
        ids = self._tokenizer(text, return_tensors="pt", **limits).input_ids.to(self._device)
        with torch.inference_mode():
            looked, context = self._module(ids, patches.float(), class_tokens.float())
        return looked, context


class _Branch(nn.Module):
    """The published modules, with their names; ``encoder`` is ``vlm_att_encoder.bert``."""

    def __init__(self, config: Any, queries: int, decoder_width: int) -> None:
        super().__init__()
        from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

        width, text_width = config.encoder_hidden_size, config.hidden_size
        self.encoder = InstructBlipQFormerModel(config)
        self.vlm_att_query = nn.Parameter(torch.empty(1, queries, text_width))
        self.vlm_att_ln = nn.LayerNorm(width)
        self.vlm_att_projector = nn.Linear(text_width, width)
        self.vlm_att_key_projector = nn.Linear(width, width)
        self.vlm_att_val_projector = nn.Linear(width, decoder_width)

    def forward(
        self, ids: torch.Tensor, patches: torch.Tensor, class_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``ctx = mean_q(softmax(q K^T / sqrt(C)) V)``, and the value projector behind it."""
        frames, queries = patches.shape[0], self.vlm_att_query.shape[1]
        seen = self.encoder(
            input_ids=ids.expand(frames, -1),
            query_embeds=self.vlm_att_query.expand(frames, -1, -1),
            encoder_hidden_states=self.vlm_att_ln(torch.cat((class_tokens[:, None], patches), dim=1)),
        ).last_hidden_state
        asking = self.vlm_att_projector(seen[:, :queries])
        scores = asking @ self.vlm_att_key_projector(patches).transpose(1, 2) / patches.shape[-1] ** 0.5
        looked = scores.softmax(-1).mean(1)
        return looked, self.vlm_att_val_projector((looked[:, None] @ patches)[:, 0])


def _qformer_config(directory: Path, raw: Mapping[str, Any], vocabulary: int, tower_width: int) -> Any:
    sizes = raw.get("qformer_config") or {}
    fixed = {"model_type": "instructblip_qformer", "vocab_size": vocabulary, "encoder_hidden_size": tower_width}
    config = parse_config(directory / "config.json", {**sizes, **fixed})
    config._attn_implementation = "sdpa"  # noqa: SLF001 - transformers has no public setter
    return config


def _released(name: str) -> str:
    return name.removeprefix("model.")


def _published(name: str) -> str:
    """The released name of a parameter of :class:`_Branch`."""
    if not name.startswith("encoder."):
        return name
    inner = name.removeprefix("encoder.").replace("embeddings.layernorm.", "embeddings.LayerNorm.")
    return _ENCODER + inner.replace("attention.attention.", "attention.self.")
