"""``prismserve doctor``: look at everything a cluster needs on this machine, and say what to do about the rest."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prismserve.cluster.settings import add_serve_arguments, settings_from
from prismserve.core.errors import ConfigurationError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from prismserve.cluster.checks import CheckResult
    from prismserve.cluster.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments: those of ``serve``, since it is their values that are checked."""
    parser.description = __doc__
    parser.epilog = "exit codes: 0 a cluster can start; 1 it cannot; 2 the settings themselves are wrong"
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    add_serve_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check and report; the exit codes are in ``--help``."""
    try:
        settings = settings_from(args, os.environ)
    except ConfigurationError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    results = examine(settings)
    if args.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        _print(results)
    return 0 if all(result.ok for result in results) else 1


def examine(settings: Settings) -> list[CheckResult]:
    """Every check, without fetching a model from the hub."""
    from prismserve.cluster import checks

    model, info = checks.check_model(settings, fetch=False)
    results = [checks.check_gpu(settings), checks.check_nixl(settings), checks.check_redis(settings)]
    results += [checks.check_ray(), model, checks.check_compression(settings), *checks.check_ports(settings)]
    if info is not None:
        results.append(checks.check_memory(settings, info))
    results.append(checks.check_shared_memory(settings))
    return results


def _print(results: Sequence[CheckResult]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for result in results:
        mark = Text("ok", "green") if result.ok else Text("no", "bold red")
        table.add_row(mark, result.name, Text(result.detail), Text(result.advice))
    Console(highlight=False).print(table)
    failed = sum(not result.ok for result in results)
    print(f"{failed} of {len(results)} checks failed" if failed else f"all {len(results)} checks passed")
