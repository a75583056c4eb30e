"""``prismserve presets``: which presets are in force, and an operator's word about one."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from prismserve.client import Client, ClientError
from prismserve.cluster.commands.connection import (
    EXIT_HELP,
    EXIT_INTERRUPTED,
    EXIT_OK,
    add_connection_arguments,
    exit_code,
    explain,
)
from prismserve.cluster.commands.status import preset_states, presets_table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from typing import Any

_WIDTH = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = "Show which presets are in force, or decide about one of them."
    parser.epilog = EXIT_HELP
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--hold", metavar="PRESET", help="serve the next milder preset in its place")
    chosen.add_argument("--release", metavar="PRESET", help="keep it in force, whatever replays say")
    chosen.add_argument("--auto", metavar="PRESET", help="leave it to the fidelity guard, beginning without evidence")
    add_connection_arguments(parser, timeout_s=5.0)
    parser.add_argument("--json", action="store_true", help="print the whole document as JSON")


def run(args: argparse.Namespace) -> int:
    """Ask, print, and return the exit code (see ``--help``)."""
    words = {"hold": args.hold, "release": args.release, "auto": args.auto}
    asked = [(preset, control) for control, preset in words.items() if preset is not None]
    try:
        with Client(args.target, api_key=args.api_key, timeout_s=args.timeout_s) as client:
            found: Mapping[str, Any]
            found = client.set_preset(*asked[0]) if asked else client.status().document.get("fidelity", {})
    except ClientError as error:
        print(f"error: {explain(error, args.target)}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
        console.print(presets_table(preset_states(found)))
    return EXIT_OK
