"""``prismserve presets``: which presets are in force, what they stand for, and an operator's word about one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prismserve.client import Client, ClientError
from prismserve.cluster.commands.connection import (
    EXIT_HELP,
    EXIT_INTERRUPTED,
    EXIT_OK,
    add_connection_arguments,
    exit_code,
    explain,
    printable,
)
from prismserve.cluster.commands.status import preset_states, presets_table
from prismserve.compression.presets_table import FAMILIES, described

if TYPE_CHECKING:
    import argparse
    from typing import Any

_WIDTH = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Show which presets are in force and what they do to the model that is served, or decide about one of them."
    )
    parser.epilog = EXIT_HELP
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--hold", metavar="PRESET", help="serve the next milder preset in its place")
    chosen.add_argument("--release", metavar="PRESET", help="keep it in force, whatever replays say")
    chosen.add_argument("--auto", metavar="PRESET", help="leave it to the fidelity guard, beginning without evidence")
    chosen.add_argument(
        "--families", action="store_true", help="what each preset does to every model family; asks no cluster"
    )
    add_connection_arguments(parser, timeout_s=5.0)
    parser.add_argument("--json", action="store_true", help="print the whole document as JSON")


def run(args: argparse.Namespace) -> int:
    """Ask, print, and return the exit code (see ``--help``)."""
    if args.families:
        return _show_families(as_json=args.json)
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
        console, states = _console(), preset_states(found)
        console.print(presets_table(states))
        told = {
            name: entry["stands_for"] for name, entry in states.items() if isinstance(entry.get("stands_for"), Mapping)
        }
        if told:
            console.print()
            console.print(_plans("on this model", told))
            evidence = {str(entry.get("evidence", "")) for entry in told.values()}
            console.print("\nlosses: " + printable("; ".join(sorted(evidence))), soft_wrap=True)
    return EXIT_OK


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


def _show_families(*, as_json: bool) -> int:
    """The reviewed table: every family with its presets, their losses and where those come from."""
    families = {name: {"title": entry.title, "presets": described(name)} for name, entry in FAMILIES.items()}
    if as_json:
        print(json.dumps(families, indent=2))
        return EXIT_OK
    console = _console()
    for name, entry in FAMILIES.items():
        console.print(_plans(f"{entry.title} ({name})", described(name)))
        console.print(f"losses: {entry.evidence.value}\n", soft_wrap=True)
    return EXIT_OK


def _plans(title: str, told: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each preset: what it does to images and videos, and the points of exact match that loses."""
    kinds = [kind for kind in ("images", "videos") if any(kind in entry for entry in told.values())]
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="bold")
    for heading in ("preset", *(part for kind in kinds for part in (kind, "loses"))):
        table.add_column(heading, overflow="fold")
    for name, entry in told.items():
        cells = [str(entry.get(part, "")) for kind in kinds for part in (kind, f"{kind}_loss")]
        table.add_row(Text(printable(name)), *(Text(printable(cell) or "-") for cell in cells))
    return table
