"""Strict readers of untrusted request fields: the type, the range and the field's name in every error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from prismserve.core.errors import InvalidRequestError

INT64_MAX: Final = 2**63 - 1
_DEPTH_MAX: Final = 64


def refuse(field: str, reason: str) -> NoReturn:
    """Raise InvalidRequestError for ``field``."""
    message = f"{field}: {reason}"
    raise InvalidRequestError(message, field=field)


def _named(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array"}
    return names.get(type(value), "an object")


def integer(body: Mapping[str, Any], field: str, low: int, high: int) -> int | None:
    """An integer within [low, high], or None if absent or null. Booleans and floats are refused."""
    value = body.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        refuse(field, f"must be an integer, got {_named(value)}")
    if not low <= value <= high:
        refuse(field, f"must be between {low} and {high}")
    return value


def number(body: Mapping[str, Any], field: str, low: float, high: float, *, above_low: bool = False) -> float | None:
    """A finite number within [low, high] (``above_low``: low itself is refused), or None if absent or null."""
    value = body.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(field, f"must be a number, got {_named(value)}")
    # An integer may be too large for a float; comparing it first avoids the conversion.
    if isinstance(value, float) and not math.isfinite(value):
        refuse(field, "must be finite")
    if value > high or value < low or (above_low and value == low):
        bound = f"above {low:g} and at most {high:g}" if above_low else f"between {low:g} and {high:g}"
        refuse(field, f"must be {bound}")
    return float(value)


def boolean(body: Mapping[str, Any], field: str, *, default: bool = False) -> bool:
    """A boolean; ``default`` if absent or null."""
    value = body.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        refuse(field, f"must be a boolean, got {_named(value)}")
    return value


def text(value: Any, field: str, *, chars_max: int | None = None) -> str:
    """A string that UTF-8 can hold."""
    if not isinstance(value, str):
        refuse(field, f"must be a string, got {_named(value)}")
    if chars_max is not None and len(value) > chars_max:
        refuse(field, f"has {len(value)} characters, at most {chars_max} are allowed")
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(field, "holds a lone surrogate, which is not text")
    return value


def mapping(value: Any, field: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        refuse(field, f"must be an object, got {_named(value)}")
    return value


def array(value: Any, field: str, *, items_max: int | None = None) -> Sequence[Any]:
    """A JSON array of at most ``items_max`` items."""
    if not isinstance(value, list):
        refuse(field, f"must be an array, got {_named(value)}")
    if items_max is not None and len(value) > items_max:
        refuse(field, f"has {len(value)} items, at most {items_max} are allowed")
    return value


def json_object(data: bytes) -> Mapping[str, Any]:
    """Parse a request body. NaN and Infinity are read as numbers, so that the field that holds them can be named."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        refuse("body", "is not UTF-8")
    except RecursionError:
        refuse("body", "is nested too deeply")
    except ValueError as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        refuse("body", f"is not valid JSON{where}")
    _check_depth(value)
    return mapping(value, "body")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH_MAX):
        level = [
            child
            for item in level
            if isinstance(item, list | dict)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, list | dict)
        ]
        if not level:
            return
    refuse("body", f"is nested deeper than {_DEPTH_MAX} levels")
