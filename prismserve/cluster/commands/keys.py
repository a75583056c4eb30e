"""``prismserve keys TENANT``: make an API key, and print what the keys file of the cluster needs of it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from prismserve.core.errors import ConfigurationError
from prismserve.router.tenants import TenantsFile, hash_key, new_key

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = __doc__
    parser.epilog = "The key is shown once and kept nowhere; the file holds its SHA-256 only."
    parser.add_argument("tenant", metavar="TENANT", help="1 to 64 letters, digits, '.', '_', '-'")


def run(args: argparse.Namespace) -> int:
    """Print the key to standard output and the file's entry to standard error; 2 if the tenant's name is not one."""
    key = new_key()
    entry = {"name": args.tenant, "keys": [hash_key(key)]}
    try:
        TenantsFile.read({"tenants": [entry]}, "TENANT")
    except ConfigurationError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    print(key)
    print(f"tenants:\n  - name: {args.tenant}\n    keys:\n      - {hash_key(key)}", file=sys.stderr)
    return 0
