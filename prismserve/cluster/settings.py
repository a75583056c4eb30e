"""The settings of a cluster, and the only reader of flags, environment variables and the configuration file.

A value comes from the first of these that gives one: command-line flag, ``PRISMSERVE_*`` environment variable,
``--config`` file (YAML), default. Nested fields are written ``engine.block_tokens`` in the file's tree,
``PRISMSERVE_ENGINE__BLOCK_TOKENS`` in the environment and ``--engine-block-tokens`` as a flag.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from prismserve.core.config import FrozenConfig, NonNegativeInt, Port, PositiveInt, PositiveSeconds
from prismserve.core.errors import ConfigurationError
from prismserve.engine.config import EngineConfig
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.index.config import IndexConfig
from prismserve.kv_transfer.index.url import parse_url
from prismserve.kv_transfer.tiers.config import TierConfig
from prismserve.models.source import REFERENCE
from prismserve.router.config import RouterConfig
from prismserve.router.fidelity.config import FidelityConfig
from prismserve.router.tenants import TenantsFile

if TYPE_CHECKING:
    import argparse

    from pydantic.fields import FieldInfo

ENVIRONMENT_PREFIX: Final = "PRISMSERVE_"
_CONFIG_VARIABLE: Final = "PRISMSERVE_CONFIG"
API_KEY_VARIABLE: Final = "PRISMSERVE_API_KEY"
"""What ``chat`` and ``status`` send; no setting of a cluster."""
# The names the field knows these by.
_SHORT_FLAGS: Final = {"engine.kv_cache_bytes": "--kv-cache-memory", "engine.kv_cache_dtype": "--kv-cache-dtype"}
_CONFIG_BYTES_MAX: Final = 1 << 20
_BYTE_UNITS: Final = {"b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_BYTE_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(b|kib|mib|gib|tib)", re.IGNORECASE)
# Kubernetes injects these for every Service of the namespace, one named prismserve-* included.
_SERVICE_LINK: Final = re.compile(r"_(SERVICE_HOST|SERVICE_PORT\w*|PORT(_\d+_(TCP|UDP)\w*)?)$")

SettingPath = tuple[str, ...]


class Settings(FrozenConfig):
    """Everything a cluster is started with. Immutable; the same values can be given as file, environment or flags."""

    model: str = Field(
        default=REFERENCE,
        min_length=1,
        description="Checkpoint to serve: a Hugging Face checkpoint directory, a hub name (`owner/name`), or "
        "`reference` for the bundled model.",
    )
    served_model_name: str | None = Field(
        default=None, min_length=1, description="Name clients use; unset: the last part of `model`."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Type of weights and KV; `auto` is bfloat16 where the device computes in it."
    )
    compression: str = Field(
        default="off", min_length=1, description="Compression preset of requests that do not name one; `off` is exact."
    )
    host: str = Field(
        default="127.0.0.1", min_length=1, description="Address both front doors listen on; `0.0.0.0` for all."
    )
    port: Port = Field(default=8000, description="HTTP port (TCP port number; 0 lets the system choose).")
    grpc_port: Port = Field(default=9000, description="gRPC port (TCP port number; 0 lets the system choose).")
    router_replicas: PositiveInt = Field(default=1, description="Router processes (count).")
    prefill_replicas: NonNegativeInt = Field(default=1, description="Prefill workers (count).")
    decode_replicas: NonNegativeInt = Field(default=1, description="Decode workers (count).")
    mixed_replicas: NonNegativeInt = Field(default=0, description="Workers that do both prefill and decode (count).")
    num_gpus_per_worker: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="GPUs each worker asks Ray for (count, fractions allowed); unset: an equal share, at most 1.",
    )
    cpus_per_worker: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="CPU cores each worker asks Ray for (count, fractions allowed); unset: an equal share.",
    )
    threads_per_worker: PositiveInt | None = Field(
        default=None,
        description="Threads each worker computes with (count); unset: the whole cores of `cpus_per_worker`, and where "
        "that is unset too, the cores a worker may use by its affinity and control groups divided by the workers that "
        "fit on its node.",
    )
    redis_url: str | None = Field(
        default=None,
        repr=False,
        description="Redis or Valkey for the prefix index (`redis://`, `rediss://` or `unix://` URL); unset: an "
        "embedded server lives and dies with the cluster.",
    )
    api_keys: str | None = Field(
        default=None,
        min_length=1,
        description="File (YAML) of tenants with the hashes of their API keys, see docs/tenants.md; unset: no key is "
        "asked for and everybody is one tenant.",
    )
    cluster_name: str = Field(
        default="prismserve",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Separates clusters that share one Redis: 1 to 64 letters, digits, `.`, `_`, `-`.",
    )
    ray_address: str | None = Field(
        default=None, description="Ray cluster to join (`auto` or `host:port`); unset: a local one is started."
    )
    startup_timeout_s: PositiveSeconds = Field(
        default=300.0, description="How long the cluster may take until it can serve (seconds)."
    )
    drain_timeout_s: PositiveSeconds = Field(
        default=30.0, description="How long running requests may go on after a stop signal (seconds)."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe message that is logged."
    )
    engine: EngineConfig = Field(default_factory=EngineConfig, description="Engine of every worker.")
    transfer: TransferConfig = Field(default_factory=TransferConfig, description="How KV moves between workers.")
    tiers: TierConfig = Field(
        default_factory=TierConfig, description="Host memory and files that keep KV the device has no room for."
    )
    index: IndexConfig = Field(default_factory=IndexConfig, description="Prefix index and worker registry.")
    router: RouterConfig = Field(default_factory=RouterConfig, description="Front doors, limits and placement.")
    fidelity: FidelityConfig = Field(
        default_factory=FidelityConfig, description="Replays of compressed requests without compression."
    )

    @model_validator(mode="after")
    def _can_serve(self) -> Self:
        if self.port and self.port == self.grpc_port:
            message = f"port and grpc_port are both {self.port}: give each front door its own port"
            raise ValueError(message)
        if not self.mixed_replicas and not (self.prefill_replicas and self.decode_replicas):
            message = (
                "prefill_replicas and decode_replicas must both be at least 1 unless mixed_replicas is: "
                "no worker could answer a request"
            )
            raise ValueError(message)
        if self.prefill_replicas and not (self.decode_replicas or self.mixed_replicas):
            message = "decode_replicas must be at least 1 when prefill_replicas is"
            raise ValueError(message)
        return self

    @property
    def model_name(self) -> str:
        """The name clients use for the model."""
        return self.served_model_name or Path(self.model).name or self.model

    @property
    def workers(self) -> int:
        """Worker processes of all roles."""
        return self.prefill_replicas + self.decode_replicas + self.mixed_replicas


@dataclass(frozen=True, slots=True)
class Leaf:
    """One setting that holds a value, not further settings."""

    path: SettingPath
    info: FieldInfo
    meaning: str

    @property
    def name(self) -> str:
        """The name in the file's tree, dotted."""
        return ".".join(self.path)

    @property
    def flag(self) -> str:
        """The command-line flag."""
        return "--" + "-".join(self.path).replace("_", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        """The short form, where there is one, and the flag."""
        return (*([_SHORT_FLAGS[self.name]] if self.name in _SHORT_FLAGS else ()), self.flag)

    @property
    def variable(self) -> str:
        """The environment variable."""
        return ENVIRONMENT_PREFIX + "__".join(self.path).upper()

    @property
    def default(self) -> Any:
        """The value when nothing is given."""
        return self.info.get_default(call_default_factory=True)


def leaves(model: type[BaseModel] = Settings, prefix: SettingPath = ()) -> Iterator[Leaf]:
    """Every setting, depth first in the order of declaration."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from leaves(info.annotation, (*prefix, name))
        else:
            yield Leaf((*prefix, name), info, info.description or _attributes(model.__doc__ or "").get(name, ""))


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and one flag per setting, grouped by the room that owns it."""
    parser.add_argument("--config", metavar="FILE", help="configuration file (YAML)")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for leaf in leaves():
        room = leaf.path[0] if len(leaf.path) > 1 else "cluster"
        if room not in groups:
            groups[room] = parser.add_argument_group(room)
        default = "" if leaf.default in (None, PydanticUndefined) else f" (default: {as_text(leaf.default)})"
        groups[room].add_argument(
            *leaf.flags,
            dest=f"setting:{leaf.name}",
            default=None,
            metavar=metavar(leaf.info.annotation),
            help=(leaf.meaning + default).replace("%", "%%"),
        )


def settings_from(args: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """Compose the settings of a command line.

    Args:
        args: parsed by a parser that :func:`add_serve_arguments` extended.
        environ: the environment, usually ``os.environ``.

    Raises:
        ConfigurationError: one sentence that names the setting and where its value came from.
    """
    file = args.config or environ.get(_CONFIG_VARIABLE)
    document = read_config(Path(file)) if file else {}
    flags = {leaf: getattr(args, f"setting:{leaf.name}", None) for leaf in leaves()}
    return load_settings(document, environ, {k: v for k, v in flags.items() if v is not None}, origin=file or "file")


def load_settings(
    document: Mapping[str, Any],
    environ: Mapping[str, str],
    flags: Mapping[Leaf, str] | None = None,
    *,
    origin: str = "file",
) -> Settings:
    """Compose settings from a file's content, the environment and flags, later ones winning.

    Args:
        document: the tree of the configuration file (also the ``args`` of a Serve application).
        environ: environment variables; those without the prefix are ignored, unknown ones with it are refused.
        flags: text given on the command line, by setting.
        origin: what errors call the document.

    Raises:
        ConfigurationError: one sentence that names the setting and where its value came from.
    """
    tree: dict[str, Any] = {}
    origins: dict[SettingPath, str] = {}
    known = {leaf.variable: leaf for leaf in leaves()}
    _merge(tree, document)
    for leaf in known.values():
        value = _get(tree, leaf.path)
        if isinstance(value, str) and leaf.path[-1].endswith("_bytes"):
            _put(tree, leaf.path, _bytes(leaf, value, origin))
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in (_CONFIG_VARIABLE, API_KEY_VARIABLE):
            continue
        if variable not in known:
            if _SERVICE_LINK.search(variable):
                continue
            message = f"{variable}: no setting has this environment variable{_suggest(variable, known)}"
            raise ConfigurationError(message, field=variable)
        leaf = known[variable]
        _put(tree, leaf.path, _parse(leaf, environ[variable], variable))
        origins[leaf.path] = variable
    for leaf, text in (flags or {}).items():
        _put(tree, leaf.path, _parse(leaf, text, leaf.flag))
        origins[leaf.path] = leaf.flag
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, origins, origin) from None
    if settings.redis_url is not None:
        parse_url(settings.redis_url)
    return settings


def read_tenants(settings: Settings) -> TenantsFile | None:
    """The tenants of ``api_keys``; None where it is unset. ConfigurationError says what is wrong with the file."""
    if settings.api_keys is None:
        return None
    path = Path(settings.api_keys)
    return TenantsFile.read(_read_yaml(path, "api_keys", f"API keys file {path}"), f"API keys file {path}")


def client_api_key(environ: Mapping[str, str]) -> str | None:
    """The API key with which commands ask a running cluster, from ``PRISMSERVE_API_KEY``."""
    return environ.get(API_KEY_VARIABLE) or None


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration file: a YAML mapping, at most 1 MiB. ConfigurationError says what is wrong with it."""
    return _read_yaml(path, "config", f"configuration file {path}")


def _read_yaml(path: Path, field: str, name: str) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = stream.read(_CONFIG_BYTES_MAX + 1)
    except OSError as error:
        message = f"{name} cannot be read: {(error.strerror or str(error)).lower()}"
        raise ConfigurationError(message, field=field) from None
    if len(content) > _CONFIG_BYTES_MAX:
        message = f"{name} is larger than {_CONFIG_BYTES_MAX} bytes"
        raise ConfigurationError(message, field=field)
    try:
        document = yaml.safe_load(content)
    except yaml.YAMLError as error:
        message = f"{name} is not YAML: {' '.join(str(error).split())}"
        raise ConfigurationError(message, field=field) from None
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        message = f"{name} must hold a mapping"
        raise ConfigurationError(message, field=field)
    return document


def _attributes(docstring: str) -> dict[str, str]:
    """The entries of a docstring's ``Attributes:`` section, each on one line, as sentences."""
    _, _, section = inspect.cleandoc(docstring).partition("Attributes:\n")
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", section, re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entries}
    return {name: text[0].upper() + text[1:] for name, text in texts.items()}


def as_text(value: Any) -> str:
    """A value as a flag or variable would give it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list, frozenset)):
        return ",".join(as_text(item) for item in value) or "none"
    return str(value)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, without annotations; a plain type is its own only one."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(annotation) for member in _members(part))
    return (annotation,)


def metavar(annotation: Any) -> str:
    """What kind of text a setting takes, for help and documentation."""
    names: list[str] = []
    for member in _members(annotation):
        origin = typing.get_origin(member)
        if origin is Literal:
            names.append("|".join(as_text(value) for value in typing.get_args(member)))
        elif origin in (tuple, list, frozenset, set):
            names.append("LIST")
        elif origin in (dict, Mapping):
            names.append("JSON")
        elif member is not type(None):
            names.append({bool: "true|false", str: "TEXT"}.get(member, getattr(member, "__name__", "VALUE").upper()))
    return "|".join(dict.fromkeys(names))


def _parse(leaf: Leaf, text: str, source: str) -> Any:
    """Turn text into what the model validates: lists split, JSON parsed, sizes with units counted."""
    members = _members(leaf.info.annotation)
    origins = {typing.get_origin(member) for member in members}
    if type(None) in members and text.strip().lower() in ("", "none"):
        return None
    if origins & {tuple, list, frozenset, set}:
        return [item.strip() for item in text.split(",") if item.strip()]
    if origins & {dict, Mapping}:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            message = f"{leaf.name} (from {source}): not JSON: {error.msg}"
            raise ConfigurationError(message, field=leaf.name) from None
    return _bytes(leaf, text, source) if leaf.path[-1].endswith("_bytes") else text


def _bytes(leaf: Leaf, text: str, source: str) -> int | str:
    match = _BYTE_SIZE.fullmatch(text.strip())
    if match is None:
        if text.strip().isdecimal():
            return int(text)
        message = f"{leaf.name} (from {source}): {text!r} is not a number of bytes; write 1048576 or 1MiB"
        raise ConfigurationError(message, field=leaf.name)
    return round(float(match[1]) * _BYTE_UNITS[match[2].lower()])


def _merge(tree: dict[str, Any], document: Mapping[str, Any]) -> None:
    for key, value in document.items():
        if isinstance(value, Mapping):
            branch = tree.setdefault(key, {})
            _merge(branch, value)
        else:
            tree[key] = value


def _get(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    node: Any = tree
    for part in path:
        if not isinstance(node, Mapping):
            return None
        node = node.get(part)
    return node


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    node = tree
    for part in path[:-1]:
        child = node.get(part)
        if not isinstance(child, dict):
            child = node[part] = {}
        node = child
    node[path[-1]] = value


def _suggest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else "; docs/configuration.md lists them all"


def _explain(error: ValidationError, origins: Mapping[SettingPath, str], origin: str) -> ConfigurationError:
    first = error.errors(include_url=False)[0]
    location = tuple(str(part) for part in first["loc"])
    reason = str(first["msg"]).removeprefix("Value error, ")
    if not location:
        return ConfigurationError(reason, field=next(iter(re.findall(r"\w+", reason)), None))
    leaf = max(
        (path for path in (leaf.path for leaf in leaves()) if location[: len(path)] == path), key=len, default=()
    )
    name = ".".join(leaf or location)
    source = origins.get(leaf, origin)
    if first["type"] == "extra_forbidden":
        message = f"{name} (from {source}): no such setting{_suggest(name, [leaf.name for leaf in leaves()])}"
    else:
        message = f"{name} (from {source}): {reason[0].lower()}{reason[1:]}, got {first['input']!r}"
    return ConfigurationError(message, field=name)
