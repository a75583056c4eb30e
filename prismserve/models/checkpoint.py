"""A checkpoint directory as its configuration describes it: read without weights, with one clear error at a time."""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prismserve.core.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers.configuration_utils import PretrainedConfig

    from prismserve.models.base import Family, ModelShape

_FAMILIES = "prismserve.models.families"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory with its parsed configuration.

    Attributes:
        raw: ``config.json`` as written.
        generation: ``generation_config.json`` as written, empty if there is none.
        family_name: file of ``families`` that serves it.
    """

    directory: Path
    raw: Mapping[str, Any]
    generation: Mapping[str, Any]
    architecture: str
    family_name: str
    family: Family
    config: PretrainedConfig
    shape: ModelShape

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end generation: of the generation configuration, else of the model's, else of its text model's."""
        for source in (self.generation, self.raw, self.raw.get("text_config") or {}):
            ids = source.get("eos_token_id")
            if ids is not None:
                return frozenset([ids] if isinstance(ids, int) else ids)
        return frozenset()


@functools.cache
def families() -> Mapping[str, tuple[str, Family]]:
    """Supported architectures, with the family file that serves each."""
    package = importlib.import_module(_FAMILIES)
    found: dict[str, tuple[str, Family]] = {}
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        if module.name.startswith("_"):
            continue
        family = cast("Family", importlib.import_module(f"{_FAMILIES}.{module.name}").FAMILY)
        found.update(dict.fromkeys(family.architectures, (module.name, family)))
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        ModelLoadError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path} cannot be read: {error}"
        raise ModelLoadError(message, field="model") from None
    except json.JSONDecodeError as error:
        message = f"{path} is not valid JSON (line {error.lineno}: {error.msg}); download the checkpoint again"
        raise ModelLoadError(message, field="model") from None
    if not isinstance(value, dict):
        message = f"{path} must hold a JSON object, not a {type(value).__name__}; download the checkpoint again"
        raise ModelLoadError(message, field="model")
    return value


def read_count(path: Path, raw: Mapping[str, Any], name: str) -> int:
    """A positive integer of a configuration file; ModelLoadError with the file and the field if it is none."""
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        message = f"{path}: {name} must be a positive integer, got {value!r}"
        raise ModelLoadError(message, field="model")
    return value


def parse_config(path: Path, raw: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that a ``config.json`` describes; ModelLoadError if transformers does not know or accept it."""
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        message = f"{path}: model_type {kind!r} is not known to the installed transformers"
        raise ModelLoadError(message, field="model")
    try:
        return CONFIG_MAPPING[kind].from_dict(raw)
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"{path} does not describe a {kind!r} model: {reason}"
        raise ModelLoadError(message, field="model") from None


def read_checkpoint(directory: Path | str) -> Checkpoint:
    """Read and check the configuration of a checkpoint directory; touches no weights.

    Raises:
        ModelLoadError: the directory or its ``config.json`` is missing or damaged, or the model is not supported.
    """
    directory = Path(directory)
    if not directory.is_dir():
        message = f"model directory {directory} does not exist"
        raise ModelLoadError(message, field="model")
    path = directory / "config.json"
    if not path.is_file():
        message = f"{directory} holds no config.json, so it is not a Hugging Face checkpoint directory"
        raise ModelLoadError(message, field="model")
    raw = read_json(path)
    architectures = raw.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    served = families()
    if not isinstance(architecture, str) or architecture not in served:
        message = f"architecture {architecture!r} of {path} is not supported; supported: {', '.join(sorted(served))}"
        raise ModelLoadError(message, field="model")
    if raw.get("quantization_config"):
        message = (
            f"{directory} holds quantised weights, which are not supported; use a float16, bfloat16 or float32 one"
        )
        raise ModelLoadError(message, field="model")
    name, family = served[architecture]
    config = parse_config(path, raw)
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return Checkpoint(directory, raw, generation, architecture, name, family, config, family.shape(config))
