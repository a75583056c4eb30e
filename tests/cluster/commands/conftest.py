"""The commands talk to the same in-test server as the SDK."""

from __future__ import annotations

from tests.client.conftest import server

__all__ = ["server"]
