"""Whether two processes share what same-node transports need: kernel, namespaces, user."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from prismserve.core.config import FrozenConfig, NonNegativeInt
from prismserve.core.errors import TransportError


class NodeIdentity(FrozenConfig):
    """Equal for two processes exactly when they can open each other's memory and reach each other's sockets.

    Attributes:
        boot_id: of the running kernel.
        hostname: of the UTS namespace.
        pid_namespace: ``/proc/<pid>/fd`` is read in it.
        network_namespace: abstract sockets live in it.
        uid: owner of both.
    """

    boot_id: str
    hostname: str
    pid_namespace: str
    network_namespace: str
    uid: NonNegativeInt


def this_node() -> NodeIdentity:
    """The identity of this process's node; TransportError if the kernel does not tell."""
    try:
        return NodeIdentity(
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            hostname=socket.gethostname(),
            pid_namespace=str(Path("/proc/self/ns/pid").readlink()),
            network_namespace=str(Path("/proc/self/ns/net").readlink()),
            uid=os.getuid(),
        )
    except OSError as error:
        message = f"this node cannot be identified: {error.strerror}"
        raise TransportError(message) from error
