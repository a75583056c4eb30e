"""Who is asking: API keys, the tenants they belong to, and what each tenant may take.

Only hashes of keys are kept. A key is 32 random bytes, so a plain SHA-256 cannot be searched backwards, and looking its
hash up in a table tells nothing about it through time. The tenant's name, never anything the client says, enters the
cache salt; caches of two tenants are therefore never shared.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from pydantic import Field, ValidationError, model_validator

from prismserve.core.config import FrozenConfig, PositiveInt
from prismserve.core.errors import AuthenticationError, ConfigurationError, ForbiddenError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

KEY_PREFIX: Final = "psk-"
_KEY_BYTES: Final = 32
_KEY_CHARS_MAX: Final = 256
_HASH: Final = re.compile(r"sha256:[0-9a-f]{64}")


class TenantEntry(FrozenConfig):
    """One tenant of the keys file.

    Attributes:
        name: part of its cache salt; a new name starts with empty caches.
        keys: hashes of its keys, as ``prismserve keys`` prints them.
        max_concurrent_requests: requests it may have in progress in one router; None leaves the router's own limit.
        cache_share: part of a worker's KV blocks its cached prefixes may fill while others want room; None is an equal
            share for each tenant.
        admin: whether its keys may read status and metrics of the whole cluster.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    keys: tuple[str, ...] = Field(min_length=1, max_length=64)
    max_concurrent_requests: PositiveInt | None = None
    cache_share: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    admin: bool = False


class TenantsFile(FrozenConfig):
    """What ``--api-keys`` names: the tenants of a cluster."""

    tenants: tuple[TenantEntry, ...] = Field(min_length=1, max_length=4096)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [entry.name for entry in self.tenants]
        keys = [key for entry in self.tenants for key in entry.keys]
        if len(set(names)) != len(names):
            message = "two tenants have the same name"
            raise ValueError(message)
        if len(set(keys)) != len(keys):
            message = "a key stands twice"
            raise ValueError(message)
        for key in keys:
            if not _HASH.fullmatch(key):
                message = "a key is not a hash of the form sha256:<64 lower-case hexadecimal digits>"
                raise ValueError(message)
        return self

    @classmethod
    def read(cls, document: Mapping[str, Any], origin: str) -> TenantsFile:
        """Validate the file's content; ConfigurationError names the entry at fault and never shows a key."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].removeprefix("Value error, ")
            message = f"{origin}: {f'{where}: ' if where else ''}{reason[0].lower()}{reason[1:]}"
            raise ConfigurationError(message, field="api_keys") from None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who a request is served for.

    Attributes:
        name: "" is the one default tenant of a cluster without keys.
        max_concurrent_requests: see :class:`TenantEntry`.
        cache_share: see :class:`TenantEntry`.
        admin: see :class:`TenantEntry`.
    """

    name: str = ""
    max_concurrent_requests: int | None = None
    cache_share: float = 1.0
    admin: bool = False

    def require_admin(self) -> None:
        """ForbiddenError unless the tenant may see the whole cluster."""
        if not self.admin:
            message = "this key may not read status and metrics; an admin tenant's key may"
            raise ForbiddenError(message)


EVERYONE: Final = Tenant(admin=True)
"""The tenant of every caller where no keys are configured."""


class Tenants:
    """Finds the tenant of a credential.

    Args:
        file: the tenants; None serves everyone as one default tenant, whatever credential comes along.
    """

    def __init__(self, file: TenantsFile | None = None) -> None:
        self._by_hash: dict[str, Tenant] | None = None
        if file is not None:
            equal = 1.0 / len(file.tenants)
            self._by_hash = {
                key: Tenant(entry.name, entry.max_concurrent_requests, entry.cache_share or equal, entry.admin)
                for entry in file.tenants
                for key in entry.keys
            }

    @property
    def configured(self) -> bool:
        """Whether a credential is asked for."""
        return self._by_hash is not None

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant of an ``Authorization`` header.

        Raises:
            AuthenticationError: no bearer token, or one that is not known.
        """
        if self._by_hash is None:
            return EVERYONE
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            message = "an API key is needed: send it as 'Authorization: Bearer KEY'"
            raise AuthenticationError(message)
        tenant = self._by_hash.get(hash_key(token)) if len(token) <= _KEY_CHARS_MAX else None
        if tenant is None:
            message = "this API key is not known"
            raise AuthenticationError(message)
        return tenant

    def authenticate_metadata(self, metadata: Iterable[tuple[str, str | bytes]]) -> Tenant:
        """The tenant of a gRPC call's metadata; AuthenticationError as :meth:`authenticate`."""
        for key, value in metadata:
            if key == "authorization" and isinstance(value, str):
                return self.authenticate(value)
        return self.authenticate(None)


def new_key() -> str:
    """A fresh key: a prefix that secret scanners can look for, and 32 random bytes."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def hash_key(key: str) -> str:
    """What the keys file holds of a key."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
