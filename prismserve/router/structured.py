"""What the answer must be: OpenAI's ``response_format``, and ``structured_outputs`` and ``guided_*`` as in vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from prismserve.core.errors import InvalidRequestError
from prismserve.core.types import Constraint, ConstraintKind
from prismserve.router.fields import array, boolean, json_object, mapping, refuse, text

if TYPE_CHECKING:
    from prismserve.router.config import RouterConfig

_FORMATS: Final = ("text", "json_object", "json_schema")
_ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}
_KINDS: Final = ("json", "json_object", "regex", "choice", "grammar")
_JSON_OPTIONS: Final = ("whitespace_pattern", "disable_any_whitespace")


def read_constraint(body: Mapping[str, Any], config: RouterConfig) -> Constraint | None:
    """The constraint a request asks for; None if the answer is free.

    Args:
        body: the decoded body; untrusted.
        config: limits.

    Raises:
        InvalidRequestError: more than one constraint, or one of the wrong type or size; names the field.
    """
    found = [*_response_format(body, config), *_structured_outputs(body, config), *_guided(body, config)]
    if len(found) > 1:
        refuse(found[1][0], f"an answer can have one constraint only, and {found[0][0]} gives one already")
    return found[0][1] if found else None


_Found = list[tuple[str, Constraint]]


def _response_format(body: Mapping[str, Any], config: RouterConfig) -> _Found:
    field = "response_format"
    value = body.get(field)
    if value is None:
        return []
    kind = mapping(value, field).get("type")
    if kind not in _FORMATS:
        refuse(f"{field}.type", f"must be one of {', '.join(_FORMATS)}")
    if kind == "text":
        return []
    if kind == "json_object":
        return [(field, _schema(_ANY_OBJECT, field, {}, config))]
    inner = mapping(value.get("json_schema"), f"{field}.json_schema")
    return [(field, _schema(inner.get("schema"), f"{field}.json_schema.schema", {}, config))]


def _structured_outputs(body: Mapping[str, Any], config: RouterConfig) -> _Found:
    field = "structured_outputs"
    value = body.get(field)
    if value is None:
        return []
    options = mapping(value, field)
    for name, item in options.items():
        if name not in (*_KINDS, *_JSON_OPTIONS) and item not in (None, False):
            refuse(f"{field}.{name[:32]}", f"is not supported; there are {', '.join(_KINDS)}")
    found = _given(options, f"{field}.", config)
    if not found:
        refuse(field, f"must hold one of {', '.join(_KINDS)}")
    return found


def _guided(body: Mapping[str, Any], config: RouterConfig) -> _Found:
    prefix = "guided_"
    names = (*_KINDS, "whitespace_pattern")
    return _given({name: body.get(prefix + name) for name in names}, prefix, config)


def _given(options: Mapping[str, Any], prefix: str, config: RouterConfig) -> _Found:
    """The constraints among ``options``, whose fields the caller knows with ``prefix``."""
    found: _Found = []
    json_options = _json_options(options, prefix, config)
    for name in _KINDS:
        value, field = options.get(name), prefix + name
        if value is None:
            continue
        if name == "json":
            found.append((field, _schema(value, field, json_options, config)))
        elif name == "json_object":
            if boolean(options, name):
                found.append((field, _schema(_ANY_OBJECT, field, json_options, config)))
        elif name == "choice":
            found.append((field, _choice(value, field, config)))
        else:
            written = text(value, field, chars_max=config.max_constraint_chars)
            if not written:
                refuse(field, "must not be empty")
            found.append((field, Constraint(ConstraintKind(name), written)))
    return found


def _json_options(options: Mapping[str, Any], prefix: str, config: RouterConfig) -> dict[str, Any]:
    """White space between the parts of a JSON answer, in the words of the grammar library."""
    if boolean(options, "disable_any_whitespace"):
        return {"whitespace_flexible": False, "whitespace_pattern": None}
    pattern = options.get("whitespace_pattern")
    if pattern is None:
        return {}
    limit = config.max_constraint_chars
    return {"whitespace_pattern": text(pattern, f"{prefix}whitespace_pattern", chars_max=limit)}


def _schema(value: Any, field: str, options: Mapping[str, Any], config: RouterConfig) -> Constraint:
    if isinstance(value, str):
        try:
            value = json_object(text(value, field, chars_max=config.max_constraint_chars).encode())
        except InvalidRequestError as error:
            refuse(field, f"is no JSON schema: {error.message}")
    schema = mapping(value, field)
    if options:
        schema = {**schema, "x-guidance": dict(options)}
    # The order of properties is kept: it is the order in which the answer gives them.
    try:
        written = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        refuse(field, "must hold finite numbers only")
    return Constraint(ConstraintKind.JSON_SCHEMA, text(written, field, chars_max=config.max_constraint_chars))


def _choice(value: Any, field: str, config: RouterConfig) -> Constraint:
    items = [text(item, f"{field}[{index}]") for index, item in enumerate(array(value, field))]
    if not items or not all(items):
        refuse(field, "must hold at least one string, and no empty one")
    written = json.dumps(items, ensure_ascii=False, separators=(",", ":"))
    return Constraint(ConstraintKind.CHOICE, text(written, field, chars_max=config.max_constraint_chars))
