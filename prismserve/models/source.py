"""From what a user calls a model to a checkpoint directory on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from prismserve.core.errors import ModelLoadError
from prismserve.models.reference import reference_path

REFERENCE: Final = "reference"
_HUB_NAME: Final = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(name: str) -> Path:
    """The checkpoint directory of ``name``.

    Args:
        name: ``reference`` (the bundled model), a directory, or a hub name ``owner/model`` that is in the local
            cache or can be downloaded.

    Raises:
        ModelLoadError: one sentence that says what was tried.
    """
    if name == REFERENCE:
        return reference_path()
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        message = f"model {name} is a file, not a checkpoint directory"
        raise ModelLoadError(message, field="model")
    if directory.is_absolute() or name.startswith((".", "~")) or not _HUB_NAME.fullmatch(name):
        message = f"model directory {name} does not exist"
        raise ModelLoadError(message, field="model")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=5))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = type(error).__name__
        message = f"model {name} is no local directory and could not be fetched from the hub ({reason})"
        raise ModelLoadError(message, field="model") from error
