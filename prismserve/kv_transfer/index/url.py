"""Parsing of index URLs, kept apart so that a password never reaches a message.

``redis://[user[:password]@]host[:6379][/db]`` one server; ``rediss://`` the same over TLS;
``unix://[user[:password]@]/path/to.sock``;
``redis+sentinel://[user[:password]@]host[:26379],host…/service[/db]`` the master of a service;
``redis+cluster://[user[:password]@]host[:6379],host…`` a Redis Cluster. ``rediss+…`` is TLS for either.

Query options: ``ca``, ``cert``, ``key`` (PEM files), ``check_hostname=false``, and for Sentinel
``sentinel_username`` and ``sentinel_password``. User and password are percent-decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from prismserve.core.errors import ConfigurationError

_SCHEMES: Final = {
    "redis": ("standalone", False),
    "rediss": ("standalone", True),
    "unix": ("unix", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_OPTIONS: Final = frozenset({"ca", "cert", "key", "check_hostname", "sentinel_username", "sentinel_password"})
_PORTS: Final = {"standalone": 6379, "sentinel": 26379, "cluster": 6379}
_PORT_MAX: Final = 65535


@dataclass(frozen=True, slots=True)
class IndexUrl:
    """A parsed index URL; ``str()`` of it shows scheme, hosts and path, never credentials or options."""

    mode: str
    tls: bool
    hosts: tuple[tuple[str, int], ...]
    username: str | None = None
    password: str | None = None
    database: int = 0
    service: str = ""
    path: str = ""
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    check_hostname: bool = True
    sentinel_username: str | None = None
    sentinel_password: str | None = None

    def __str__(self) -> str:
        """The URL without credentials and options."""
        if self.mode == "unix":
            return f"unix://{self.path}"
        scheme = "rediss" if self.tls else "redis"
        if self.mode != "standalone":
            scheme += f"+{self.mode}"
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{scheme}://{hosts}" + (f"/{self.service}" if self.service else "")

    def __repr__(self) -> str:
        """As ``str()``: a traceback must not show credentials either."""
        return f"IndexUrl({self})"


def parse_url(url: str) -> IndexUrl:
    """Parse an index URL.

    Raises:
        ConfigurationError: the URL is not of a documented form; the message does not repeat it.
    """
    try:
        parts = urlsplit(url)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        # Not chained: the library's message may repeat the part that holds the password.
        raise _refuse("is not a URL") from None
    if parts.scheme not in _SCHEMES:
        raise _refuse(f"has an unknown scheme; use one of {', '.join(name + '://' for name in _SCHEMES)}")
    mode, tls = _SCHEMES[parts.scheme]
    options = dict(pairs)
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise _refuse(f"has an unknown option; use {', '.join(sorted(_OPTIONS))}")
    if parts.fragment:
        raise _refuse("has a fragment; percent-encode '#' in a password")
    username, password, address = _credentials(parts)
    service, database = _path(mode, parts.path)
    return IndexUrl(
        mode=mode,
        tls=tls,
        hosts=() if mode == "unix" else _hosts(mode, address),
        username=username,
        password=password,
        database=database,
        service=service,
        path=unquote(parts.path) if mode == "unix" else "",
        ca=_file(options, "ca"),
        cert=_file(options, "cert"),
        key=_file(options, "key"),
        check_hostname=_boolean(options, "check_hostname"),
        sentinel_username=options.get("sentinel_username"),
        sentinel_password=options.get("sentinel_password"),
    )


def _refuse(what: str) -> ConfigurationError:
    return ConfigurationError(f"the index URL {what}", field="redis_url")


def _credentials(parts: SplitResult) -> tuple[str | None, str | None, str]:
    userinfo, at, address = parts.netloc.rpartition("@")
    if not at:
        return None, None, parts.netloc
    username, _, password = userinfo.partition(":")
    return unquote(username) or None, unquote(password) or None, address


def _path(mode: str, path: str) -> tuple[str, int]:
    """Service name and database number out of the URL's path."""
    if mode == "unix":
        if len(path) < 2:
            raise _refuse("names no socket; write unix:///path/to.sock")
        return "", 0
    pieces = [unquote(piece) for piece in path.strip("/").split("/") if piece]
    service = ""
    if mode == "sentinel":
        if not pieces:
            raise _refuse("names no Sentinel service; write redis+sentinel://host:26379/service")
        service = pieces.pop(0)
    if not pieces:
        return service, 0
    if mode == "cluster" or len(pieces) > 1 or not pieces[0].isdecimal():
        raise _refuse("has a path that is not a database number")
    return service, int(pieces[0])


def _hosts(mode: str, address: str) -> tuple[tuple[str, int], ...]:
    names = address.split(",")
    if mode == "standalone" and len(names) > 1:
        raise _refuse("lists several hosts; use redis+sentinel:// or redis+cluster://")
    return tuple(_host(name, _PORTS[mode]) for name in names)


def _host(name: str, default_port: int) -> tuple[str, int]:
    host, port_text = name, ""
    if name.startswith("["):
        host, bracket, rest = name[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise _refuse("has a malformed host")
        port_text = rest[1:]
    elif ":" in name:
        host, _, port_text = name.rpartition(":")
    if not host:
        raise _refuse("names no host")
    if not port_text:
        return host, default_port
    if not port_text.isdecimal() or not 0 < int(port_text) <= _PORT_MAX:
        raise _refuse(f"has a port that is not between 1 and {_PORT_MAX}")
    return host, int(port_text)


def _file(options: dict[str, str], name: str) -> str | None:
    value = options.get(name)
    if value is not None and not Path(value).is_file():
        raise _refuse(f"names a file in {name!r} that does not exist")
    return value


def _boolean(options: dict[str, str], name: str) -> bool:
    value = options.get(name, "true").lower()
    if value not in {"true", "false"}:
        raise _refuse(f"has {name!r} that is neither true nor false")
    return value == "true"
