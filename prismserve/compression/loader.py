"""Find methods by name: a method is the ``METHOD`` of the file that bears its name; there is no registry to edit."""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from prismserve.compression.base import FROM_ANY_MODEL
from prismserve.core.errors import InvalidRequestError, UnknownMethodError
from prismserve.core.hashing import canonical_json
from prismserve.core.types import MethodSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prismserve.compression.base import Codec, VisualMethod
    from prismserve.compression.cuts import PrefillMethod
    from prismserve.core.config import FrozenConfig

_PACKAGE = "prismserve.compression"


@functools.cache
def names(stage: str) -> tuple[str, ...]:
    """Names of the methods of a stage (``visual``, ``prefill`` or ``codec``), sorted."""
    package = importlib.import_module(f"{_PACKAGE}.{stage}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


def _load(stage: str, name: str, field: str) -> Any:
    if name not in names(stage):
        message = f"unknown {stage} method {name!r}; available: {', '.join(names(stage))}"
        raise UnknownMethodError(message, field=field)
    return importlib.import_module(f"{_PACKAGE}.{stage}.{name}").METHOD


def visual_method(name: str) -> VisualMethod:
    """The visual method of this name; UnknownMethodError lists the alternatives."""
    return cast("VisualMethod", _load("visual", name, "compression.visual.method"))


def prefill_method(name: str) -> PrefillMethod:
    """The prefill method of this name; UnknownMethodError lists the alternatives."""
    return cast("PrefillMethod", _load("prefill", name, "compression.prefill.method"))


def encoder_needs(name: str) -> frozenset[str]:
    """What a visual method asks of the vision encoder, by the names models use."""
    return frozenset(str(need) for need in visual_method(name).needs - FROM_ANY_MODEL)


def codec(name: str) -> Codec:
    """The wire codec of this name; UnknownMethodError lists the alternatives."""
    return cast("Codec", _load("codec", name, "compression.wire.codec"))


def method_of(stage: str, name: str) -> VisualMethod | PrefillMethod | Codec:
    """The method of this name in a stage (``visual``, ``prefill`` or ``codec``)."""
    if stage == "prefill":
        return prefill_method(name)
    return visual_method(name) if stage == "visual" else codec(name)


def method_config(method: VisualMethod | PrefillMethod | Codec, params: Mapping[str, Any], field: str) -> FrozenConfig:
    """Validate parameters; InvalidRequestError names the field and the reason."""
    try:
        return method.Config.model_validate(dict(params))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([field, *(str(part) for part in first["loc"])])
        message = f"{where}: {first['msg']}"
        raise InvalidRequestError(message, field=where) from None


def normalise(method: VisualMethod | PrefillMethod | Codec, params: Mapping[str, Any], field: str) -> MethodSpec:
    """A spec with every default filled in and the method's version, so that equal plans have equal fingerprints."""
    values = {**method_config(method, params, field).model_dump(), "version": method.version}
    return MethodSpec(method.name, tuple(sorted(values.items())))


def config_of(spec: MethodSpec, stage: str) -> FrozenConfig:
    """The validated configuration of a normalised spec."""
    # Specs that differ only in int against float are equal in Python; their canonical bytes are not.
    return _config(stage, spec.name, canonical_json(dict(spec.params)))


def forget() -> None:
    """Look at the folders again: a method's file was added or removed."""
    names.cache_clear()
    _config.cache_clear()


@functools.lru_cache(maxsize=1024)
def _config(stage: str, name: str, params: bytes) -> FrozenConfig:
    values = {key: value for key, value in json.loads(params).items() if key != "version"}
    return method_config(method_of(stage, name), values, f"compression.{stage}")


def kept_tokens(spec: MethodSpec, tokens: int) -> int:
    """Visual tokens that remain of ``tokens`` under a normalised visual spec."""
    return visual_method(spec.name).kept_tokens(config_of(spec, "visual"), tokens)
