"""The bundled reference model: weights, processor and tokenizer as package data, its scenes, training and evaluation.

``reference_path`` is what the rest of the package uses. The other rooms stand on their own: ``scenes`` draws
pictures and questions, ``build`` makes an untrained model and its processor, ``forward`` is the written-out forward
pass training runs, ``data`` packs questions, ``heads`` holds the throw-away heads, ``optimizer`` and ``stages`` train,
``train`` is the command, ``evaluate`` and ``ablation`` measure; ``clips`` and the files beside it do the same for short
videos. None of them is imported when serving.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from prismserve.core.errors import ModelLoadError

__all__ = ["reference_path"]


def reference_path() -> Path:
    """Directory of the bundled checkpoint, in the layout of a Hugging Face repository.

    Raises:
        ModelLoadError: the package was installed without its data, or from inside a zip archive.
    """
    folder = importlib.resources.files(__name__) / "weights"
    if not isinstance(folder, Path) or not (folder / "config.json").is_file():
        message = "the bundled reference model is missing from this installation: reinstall prismserve from its wheel"
        raise ModelLoadError(message, field="model")
    return folder
