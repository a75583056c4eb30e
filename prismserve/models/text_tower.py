"""CLIP's text tower beside a model whose vision tower is CLIP's: both take what they see into one space.

A checkpoint directory may hold a folder ``text_tower`` with a CLIP checkpoint (``CLIPModel``: config, tokenizer, weights as
safetensors), whose vision tower is the model's own. Of that checkpoint the text tower, both projections and the norm
behind the vision tower are loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import xxhash
from torch.nn import functional

from prismserve.core.errors import ModelLoadError
from prismserve.core.hashing import digest
from prismserve.models.checkpoint import read_json

if TYPE_CHECKING:
    from pathlib import Path

FOLDER: Final = "text_tower"
NEED_TEXT_TOWER: Final = "text_tower"

_HASH_CHUNK_BYTES: Final = 1 << 24
_VISION: Final = ("vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias", "visual_projection.weight")


def text_tower_directory(checkpoint: Path) -> Path | None:
    """The folder of a checkpoint's text tower, None if it has none."""
    folder = checkpoint / FOLDER
    return folder if folder.is_dir() else None


def folder_fingerprint(directory: Path) -> bytes:
    """32 bytes over the name of a folder and the content of every file in it."""
    parts: list[bytes] = []
    for file in sorted(directory.iterdir()):
        if file.is_file():
            state = xxhash.xxh3_128()
            with file.open("rb") as stream:
                while chunk := stream.read(_HASH_CHUNK_BYTES):
                    state.update(chunk)
            parts += [file.name.encode(), state.digest()]
    return digest("folder", directory.name.encode(), *parts)


class TextTower:
    """Takes patches of the vision tower, and text, into the space they share. Float32; not thread-safe."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        """Load the CLIP checkpoint in ``directory``.

        Raises:
            ModelLoadError: there is none, or it lacks something.
        """
        # Imported here: processors and routers read configurations without paying for the model code.
        from transformers.initialization import no_init_weights
        from transformers.models.auto.tokenization_auto import AutoTokenizer
        from transformers.models.clip.configuration_clip import CLIPConfig
        from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

        raw = read_json(directory / "config.json")
        if raw.get("model_type") != "clip":
            message = f"{directory} holds no CLIP checkpoint, but one of type {raw.get('model_type')!r}"
            raise ModelLoadError(message, field="model")
        stored = _tensors(directory)
        missing = [name for name in _VISION if name not in stored]
        if missing:
            message = f"{directory} lacks {', '.join(missing)}; it must hold a whole CLIP checkpoint as safetensors"
            raise ModelLoadError(message, field="model")
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            config = CLIPConfig.from_dict(raw)
            config.text_config.projection_dim = config.projection_dim
            with no_init_weights():
                text: Any = CLIPTextModelWithProjection(config.text_config)
            own = text.state_dict().keys()
            text.load_state_dict({name: tensor for name, tensor in stored.items() if name in own})
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            message = f"the text tower in {directory} cannot be loaded: {error}"
            raise ModelLoadError(message, field="model") from error
        weight, bias, projection = (stored[name] for name in _VISION)
        self._tokenizer: Any = tokenizer
        self._text = text.to(device).eval().requires_grad_(requires_grad=False)
        self._tokens_max = int(config.text_config.max_position_embeddings)
        self._norm = weight.to(device), bias.to(device)
        self._projection = projection.to(device)
        self._epsilon = float(config.vision_config.layer_norm_eps)
        self._device = device
        self._directory = directory

    def patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, C] patches of the vision tower to [N, P] float32; ModelLoadError if that is not the model's own."""
        width = self._norm[0].shape[0]
        if tokens.shape[1] != width:
            message = f"the vision tower of {self._directory} is {width} wide, that of the model {tokens.shape[1]}"
            raise ModelLoadError(message, field="model")
        normed = functional.layer_norm(tokens.float(), (tokens.shape[1],), *self._norm, self._epsilon)
        return normed @ self._projection.T

    def text(self, text: str) -> torch.Tensor:
        """[1, P] float32 of a text, cut off behind the tower's context; [0, P] of none."""
        if not text.strip():
            return self._projection.new_zeros((0, self._projection.shape[0]))
        ids = self._tokenizer(text, truncation=True, max_length=self._tokens_max, return_tensors="pt")
        with torch.inference_mode():
            embeds: torch.Tensor = self._text(**ids.to(self._device)).text_embeds
        return embeds


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint in one file or several has of the text tower, the projections and the norm, float32."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stored:
                names = [name for name in stored.keys() if name.startswith("text_") or name in _VISION]  # noqa: SIM118
                found |= {name: stored.get_tensor(name).float() for name in names}
        except (SafetensorError, OSError) as error:
            message = f"{file} cannot be read: {error}"
            raise ModelLoadError(message, field="model") from error
    return found
