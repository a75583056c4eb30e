"""The API field ``compression``: from a name or an object to a normalised plan.

Accepted forms::

    "balanced"                                   a preset
    "visionzip"                                  a visual method with its defaults
    "fastv"                                      a prefill method with its defaults
    {"preset": "balanced",                       what the object leaves out; the server default if absent
     "visual": {"method": "visionzip", "keep": 64},
     "prefill": {"method": "fastv", "keep": 0.5},
     "wire": {"codec": "int4", "residual": 32, "text": "none"}}

Inside an object a string stands for the bare name (``"wire": "int8"``), and leaving out ``method`` or ``codec`` keeps
the one below and changes its parameters only. ``null`` is the same as absent.

What a preset stands for depends on what the model's images and videos allow: ``presets_table``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from prismserve.compression import loader, wire
from prismserve.compression.presets_table import PRESETS, Basis, Preset
from prismserve.core.errors import InvalidRequestError, UnknownMethodError
from prismserve.core.types import CompressionPlan, MethodSpec

FIELD: Final = "compression"
TEXT_MAX: Final = 64
"""Longest name, key or string value, in characters."""
KEYS_MAX: Final = 16
"""Most keys of one object."""
INTEGER_MAX: Final = 2**53
"""Largest magnitude of an integer parameter: every JSON reader holds it exactly."""

_STAGES: Final[Mapping[str, str]] = MappingProxyType({"visual": "method", "prefill": "method", "wire": "codec"})
_NAMES: Final = tuple(PRESETS[Basis.SALIENCE])
_CUSTOM: Final = "custom"


def names() -> tuple[str, ...]:
    """The presets, from exact to smallest."""
    return _NAMES


def resolve(value: str | Mapping[str, Any] | None, default: str, basis: Basis = Basis.SALIENCE) -> CompressionPlan:
    """Turn what a request asked for into a plan.

    Args:
        value: the field as it came from JSON: a name, an object, or None for the server's default. Untrusted.
        default: a preset or method name; fills in what ``value`` leaves out.
        basis: what presets find to act on; see :func:`prismserve.compression.presets_table.basis_of`.

    Returns:
        A plan whose specs are normalised: equal requests give equal fingerprints. ``preset`` is the preset's name if
        nothing was changed in it, else ``"custom"``.

    Raises:
        UnknownMethodError: no such preset, method or codec; lists those there are.
        InvalidRequestError: wrong type, unknown key, value out of range; names the field by its path.
    """
    if value is None:
        return _named(default, "", basis)
    if isinstance(value, str):
        return _named(_text(value, FIELD), default, basis)
    asked = _object(value, FIELD)
    _check_keys(asked, ("preset", *_STAGES), FIELD)
    base = _base(asked.get("preset"), default, basis)
    visual = _part(asked.get("visual"), "visual", base.visual)
    prefill = _part(asked.get("prefill"), "prefill", base.prefill)
    on_wire = _part(asked.get("wire"), "wire", base.wire)
    changed = (visual, prefill, on_wire) != (base.visual, base.prefill, base.wire)
    return CompressionPlan(visual, on_wire, _CUSTOM if changed else base.preset, prefill)


def asked(value: str | Mapping[str, Any] | None, default: str) -> str | None:
    """The preset that a request asks for and changes nothing of, itself or through the server's default.

    Args:
        value: as for :func:`resolve`, which has accepted it.
        default: as there.

    Returns:
        Its name; None where the request names a method, a codec or a parameter.
    """
    if isinstance(value, Mapping):
        given = {key: item for key, item in value.items() if item is not None}
        if given.keys() - {"preset"}:
            return None
        value = given.get("preset")
    name = default if value is None else value
    return name if name in _NAMES else None


def _base(preset: Any, default: str, basis: Basis) -> CompressionPlan:
    if preset is None:
        return _named(default, "", basis)
    field = f"{FIELD}.preset"
    if not isinstance(preset, str):
        message = f"{field} must be a name, not {_kind(preset)}"
        raise InvalidRequestError(message, field=field)
    if _text(preset, field) not in _NAMES:
        message = f"unknown preset {preset!r}; available: {', '.join(_NAMES)}"
        raise UnknownMethodError(message, field=field)
    return _named(preset, "", basis)


@functools.lru_cache(maxsize=64)
def _named(name: str, default: str, basis: Basis) -> CompressionPlan:
    """The plan of a preset or method name; a method leaves the wire to ``default``, none if that is empty.

    A name that both a visual and a prefill method have is the visual one's.
    """
    none = _spec("prefill", "none", {})
    if name in _NAMES:
        preset = PRESETS[basis][name]
        return CompressionPlan(_visual(preset), _spec("wire", preset.codec, {}), name, none)
    visuals, prefills = loader.names("visual"), loader.names("prefill")
    if name not in visuals and name not in prefills:
        message = (
            f"unknown {FIELD} {name!r}; presets: {', '.join(_NAMES)}; visual methods: {', '.join(visuals)}; "
            f"prefill methods: {', '.join(prefills)}"
        )
        raise UnknownMethodError(message, field=FIELD)
    wire_spec = _named(default, "", basis).wire if default else _spec("wire", "none", {})
    if name in visuals:
        return CompressionPlan(_spec("visual", name, {}), wire_spec, _CUSTOM, none)
    return CompressionPlan(_spec("visual", "none", {}), wire_spec, _CUSTOM, _spec("prefill", name, {}))


def _visual(preset: Preset) -> MethodSpec:
    return _spec("visual", preset.visual, {} if preset.visual == "none" else {"keep": preset.keep})


def _part(value: Any, stage: str, base: MethodSpec) -> MethodSpec:
    """The spec of one stage: ``base`` if absent, by name if a string, else an object of name and parameters."""
    field, name_key = f"{FIELD}.{stage}", _STAGES[stage]
    if value is None:
        return base
    if isinstance(value, str):
        return _spec(stage, _text(value, field), {})
    asked = _object(value, field)
    name = asked.get(name_key)
    params = {key: _scalar(item, f"{field}.{key}") for key, item in asked.items() if key != name_key}
    if name is None:
        inherited = {key: item for key, item in base.params if key != "version" and base.name != "none"}
        return _spec(stage, base.name, {**inherited, **params})
    if not isinstance(name, str):
        message = f"{field}.{name_key} must be a name, not {_kind(name)}"
        raise InvalidRequestError(message, field=f"{field}.{name_key}")
    return _spec(stage, _text(name, f"{field}.{name_key}"), params)


def _spec(stage: str, name: str, params: Mapping[str, Any]) -> MethodSpec:
    field = f"{FIELD}.{stage}"
    if stage != "wire" and name == "none" and params:
        key = next(iter(params))
        message = (
            f"{field}.{key} has no meaning for method 'none', which keeps every token; name another {field}.method"
        )
        raise InvalidRequestError(message, field=f"{field}.{key}")
    method = loader.method_of("codec" if stage == "wire" else stage, name)
    _check_keys(params, (_STAGES[stage], *method.Config.model_fields), field)
    spec = loader.normalise(method, params, field)
    if stage == "wire":
        wire.table(spec)  # refuses a codec for text that there is not
    return spec


def _object(value: Any, field: str) -> Mapping[str, Any]:
    """``value`` as an object with a bounded number of short string keys."""
    if not isinstance(value, Mapping):
        message = f"{field} must be a name or an object, not {_kind(value)}"
        raise InvalidRequestError(message, field=field)
    if len(value) > KEYS_MAX:
        message = f"{field} has {len(value)} keys, at most {KEYS_MAX} are allowed"
        raise InvalidRequestError(message, field=field)
    for key in value:
        if not isinstance(key, str):
            message = f"{field} has a key that is {_kind(key)}, keys are strings"
            raise InvalidRequestError(message, field=field)
        _text(key, field)
    return value


def _check_keys(keys: Iterable[str], allowed: tuple[str, ...], field: str) -> None:
    for key in keys:
        if key not in allowed:
            message = f"{field} has no key {key!r}; available: {', '.join(allowed)}"
            raise InvalidRequestError(message, field=f"{field}.{key}")


def _text(value: str, field: str) -> str:
    if len(value) > TEXT_MAX:
        message = f"{field} holds a string of {len(value)} characters, at most {TEXT_MAX} are allowed"
        raise InvalidRequestError(message, field=field)
    return value


def _scalar(value: Any, field: str) -> Any:
    """A parameter as it may enter a fingerprint: a short string, bool, None, finite float or int of 53 bits."""
    if isinstance(value, str):
        return _text(value, field)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= INTEGER_MAX:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int | float):
        message = f"{field} must be finite and within 2^53"
    else:
        message = f"{field} must be a number, a string or true or false, not {_kind(value)}"
    raise InvalidRequestError(message, field=field)


def _kind(value: Any) -> str:
    """JSON's word for a value's type, for messages that must not repeat the value."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    return "null" if value is None else "a string" if isinstance(value, str) else "of that type"
