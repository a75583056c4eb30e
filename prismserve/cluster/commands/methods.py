"""``prismserve methods``: every compression method there is, where it comes from, and what it needs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import argparse

STAGES: Final = ("visual", "prefill", "codec")
_LAYERS: Final = 32
"""Of the decoder whose cuts say what a prefill method needs; only their number depends on it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = __doc__
    parser.add_argument("--json", action="store_true", help="print a JSON list, with sources and parameters")


def listed() -> list[dict[str, Any]]:
    """One entry per method, by stage and name, as the methods declare it."""
    from prismserve.compression import loader  # torch comes with it

    return [_entry(loader.method_of(stage, name)) for stage in STAGES for name in loader.names(stage)]


def _entry(method: Any) -> dict[str, Any]:
    share = getattr(method, "share", None)
    parameters = {name: field.default for name, field in method.Config.model_fields.items()}
    return {
        "name": method.name,
        "stage": str(method.stage),
        "section": method.section,
        "share": None if share is None else str(share),
        "training_free": method.training_free,
        "weights": "none needed" if method.training_free else "not loaded",
        "needs": sorted(_needs(method)),
        "version": method.version,
        "source": method.source,
        "parameters": parameters,
    }


def _needs(method: Any) -> set[str]:
    """What must be there beside the tokens: of the vision encoder, or of the layers around a prefill method's cuts."""
    if not hasattr(method, "cuts"):
        return {str(need) for need in getattr(method, "needs", ())}
    found = {"whole_grid"} if method.whole else set()
    for cut in method.cuts(method.Config(), _LAYERS):
        found |= {str(need) for need in cut.needs}
        found |= {f"{cut.raters}_attention"} if cut.raters != "none" else set()
    return found


def run(args: argparse.Namespace) -> int:
    """Print; always 0."""
    found = listed()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    columns = ("stage", "name", "section", "share", "training_free", "weights", "needs")
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for entry in found:
        table.add_row(*(_cell(entry[column]) for column in columns))
    Console(highlight=False).print(table)
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value or "-")
