"""The model that sees clips: the bundled vision tower and projector as they are, before a decoder trained for clips.

It has the architecture of LLaVA-OneVision: frames of 14 x 14 patches, projected, averaged over 2 x 2 to 7 x 7 tokens, one
learned token behind the last frame. Only the decoder is stored; :func:`write_checkpoint` puts it and the bundled
rest together as an ordinary checkpoint directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from prismserve.models.reference import reference_path
from prismserve.models.reference.build import IMAGE, PIXEL_MEAN, PIXEL_STD
from prismserve.models.reference.vocabulary import SIZE

VIDEO: Final = 622
"""Id of the token that stands for a clip: the first behind the bundled tokenizer's."""
VIDEO_TEXT: Final = "<video>"
TRAINED_FILE: Final = "decoder.safetensors"
_TRAINED: Final = "model.language_model."
_EMBEDDINGS: Final = "model.language_model.embed_tokens.weight"
_NEWLINE: Final = "model.image_newline"


def save_trained(model: Any, path: Path) -> None:
    """Write what training changed of a ``LlavaOnevisionForConditionalGeneration``, in bfloat16."""
    state = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name.startswith(_TRAINED)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def write_checkpoint(folder: Path, trained: Path | None = None) -> Path:
    """Write a Hugging Face checkpoint directory of the model that sees clips.

    Args:
        folder: made if it is missing.
        trained: what :func:`save_trained` wrote; None for the bundled decoder that has seen no clip.

    Returns:
        ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = reference_path()
    state = {_renamed(name): value for name, value in load_file(source / "model.safetensors").items()}
    state[_NEWLINE] = state[_EMBEDDINGS][IMAGE].clone()
    if trained is not None:
        state.update(load_file(trained))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(source), indent=2) + "\n", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(_frames(), indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(source)), encoding="utf-8")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    template = (source / "chat_template.jinja").read_text(encoding="utf-8")
    clips = "{% for c in m['content'] if c['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    before = "{% for c in m['content'] if c['type'] == 'text' %}"
    (folder / "chat_template.jinja").write_text(template.replace(before, clips + before), encoding="utf-8")
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    """A checkpoint directory's model in float32 and its tokenizer."""
    from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
    return model, AutoTokenizer.from_pretrained(folder)


def _renamed(name: str) -> str:
    """A bundled tensor's name in the layout that transformers has had since 4.52."""
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def _config(source: Path) -> dict[str, Any]:
    """``config.json`` of the bundled model as LLaVA-OneVision's."""
    bundled = json.loads((source / "config.json").read_text(encoding="utf-8"))
    taken = ("vision_config", "text_config", "projector_hidden_act", "multimodal_projector_bias", "dtype")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        **{name: bundled[name] for name in (*taken, *ids)},
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": [[SIZE, SIZE]],
        "tie_word_embeddings": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_aspect_ratio": "anyres_max_1",
    }


def _frames() -> dict[str, Any]:
    """How images and frames are scaled and normalised."""
    return {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": SIZE, "width": SIZE},
        "image_grid_pinpoints": [[SIZE, SIZE]],
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
    }


def _tokenizer(source: Path) -> dict[str, Any]:
    """The bundled tokenizer with one control token more."""
    tokenizer: dict[str, Any] = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    like = dict(tokenizer["added_tokens"][IMAGE])
    tokenizer["added_tokens"].append({**like, "id": VIDEO, "content": VIDEO_TEXT})
    return tokenizer
