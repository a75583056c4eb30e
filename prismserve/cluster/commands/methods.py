"""``prismserve methods``: every compression method there is, where it comes from, and what it needs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from prismserve.core.errors import PrismServeError

if TYPE_CHECKING:
    import argparse

_WIDTH: Final = 160
STAGES: Final = ("visual", "prefill", "codec")
_LAYERS: Final = 32
"""Of the decoder whose cuts say what a prefill method needs; only their number depends on it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = __doc__
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="checkpoint directory or hub name: say whether the weights that methods need beside it are there",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list, with sources and parameters")


def listed(model: str | None = None) -> list[dict[str, Any]]:
    """One entry per method, by stage and name, as the methods declare it.

    Args:
        model: whose directory is looked into for further weights; None says only what is needed.

    Raises:
        ModelLoadError: the model cannot be read.
    """
    from prismserve.compression import loader  # torch comes with it

    held = None if model is None else _beside(model)
    return [_entry(loader.method_of(stage, name), held) for stage in STAGES for name in loader.names(stage)]


def _beside(model: str) -> frozenset[str]:
    """Which further weights lie beside a model, and so are loaded with it."""
    from prismserve.models.processing import Processor
    from prismserve.models.source import resolve_model

    return Processor.from_directory(resolve_model(model)).beside


def _weights(method: Any, held: frozenset[str] | None) -> str:
    """Whether a method has the weights it needs, which lie in a folder beside the model's."""
    from prismserve.compression.base import BESIDE_THE_MODEL

    wanted = {str(need) for need in getattr(method, "needs", frozenset()) & BESIDE_THE_MODEL}
    if not wanted:
        return "none needed" if method.training_free else "not loaded"
    if held is None:
        return "beside the model"
    return "loaded" if wanted <= held else "not loaded"


def _entry(method: Any, held: frozenset[str] | None) -> dict[str, Any]:
    share = getattr(method, "share", None)
    parameters = {name: field.default for name, field in method.Config.model_fields.items()}
    return {
        "name": method.name,
        "stage": str(method.stage),
        "section": method.section,
        "share": None if share is None else str(share),
        "training_free": method.training_free,
        "weights": _weights(method, held),
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
    """Print, and return 0, or 1 if ``--model`` cannot be read."""
    try:
        found = listed(args.model)
    except PrismServeError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    columns = ("stage", "name", "section", "share", "training_free", "weights", "needs")
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for entry in found:
        table.add_row(*(_cell(entry[column]) for column in columns))
    Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH).print(table)
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value or "-")
