"""``prismserve status``: the workers of a running cluster, their queues, KV, caches and transfers, and its presets."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    from prismserve.client import ClusterStatus, WorkerStatus

_STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow", "lost": "bold red"}
_MIB = 1 << 20
_WIDTH = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = __doc__
    parser.epilog = EXIT_HELP
    add_connection_arguments(parser, timeout_s=5.0)
    parser.add_argument("--json", action="store_true", help="print the whole document as JSON")


def run(args: argparse.Namespace) -> int:
    """Ask, print, and return the exit code (see ``--help``)."""
    try:
        with Client(args.target, api_key=args.api_key, timeout_s=args.timeout_s) as client:
            status = client.status()
    except ClientError as error:
        print(f"error: {explain(error, args.target)}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if args.json:
        print(json.dumps(status.document, indent=2))
    else:
        show(status, Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH))
    return EXIT_OK


def show(status: ClusterStatus, console: Console) -> None:
    """Print the pools, then every worker, then what became of the presets."""
    console.print(_pools(status.workers))
    console.print()
    console.print(_workers(status.workers))
    states = preset_states(status.document.get("fidelity"))
    if states:
        console.print()
        console.print(presets_table(states))


def preset_states(fidelity: Any) -> dict[str, Mapping[str, Any]]:
    """The states in the block ``fidelity`` of the status document; empty where a server has none."""
    states = fidelity.get("presets") if isinstance(fidelity, Mapping) else None
    if not isinstance(states, Mapping):
        return {}
    return {str(name): entry for name, entry in states.items() if isinstance(entry, Mapping)}


def presets_table(states: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each preset: what is served in its place, who decides, and the replays it was judged by."""
    table = _table("preset", "serves", "control", "answers that differ", "at most", "KL", "since", "reason")
    for name, entry in states.items():
        held = bool(entry.get("held"))
        since_s = entry.get("since_s")
        table.add_row(
            Text(printable(name)),
            Text(printable(str(entry.get("in_force", name))), "bold yellow" if held else ""),
            Text(printable(str(entry.get("control", "")))),
            f"{entry.get('disagreed', 0)} of {entry.get('compared', 0)}",
            f"{100 * float(entry.get('disagreement_max', 0)):.0f} %",
            f"{float(entry.get('kl_nats', 0)):.3g}",
            "-" if since_s is None else f"{float(since_s):.0f} s",
            Text(printable(str(entry.get("reason", "")))),
        )
    return table


def _pools(workers: Sequence[WorkerStatus]) -> Table:
    table = _table("pool", "workers", "waiting", "running", "KV used", "prefix hits", "image hits", "transfer rate")
    for role in sorted({worker.role for worker in workers}):
        pool = [worker for worker in workers if worker.role == role]
        ready = sum(worker.state == "ready" for worker in pool)
        stats = [worker.stats for worker in pool]
        table.add_row(
            Text(printable(role)),
            f"{ready} of {len(pool)} ready",
            str(sum(entry.waiting for entry in stats)),
            str(sum(entry.running for entry in stats)),
            _share((entry.kv_blocks_used for entry in stats), (entry.kv_blocks_total for entry in stats)),
            _share((entry.prefix_hit_tokens for entry in stats), (entry.prefix_query_tokens for entry in stats)),
            _share((entry.image_hits for entry in stats), (entry.image_queries for entry in stats)),
            _rate(sum(entry.transfer_bytes for entry in stats), sum(entry.transfer_seconds for entry in stats)),
        )
    return table


def _workers(workers: Sequence[WorkerStatus]) -> Table:
    headings = ("worker", "role", "state", "epoch", "pid", "node", "waiting", "running")
    table = _table(*headings, "KV used", "prefix hits", "transfers", "rate", "failed", "step")
    for worker in sorted(workers, key=lambda entry: (entry.role, entry.id)):
        stats = worker.stats
        table.add_row(
            Text(printable(worker.id)),
            Text(printable(worker.role)),
            Text(printable(worker.state), _STATE_STYLES.get(worker.state, "")),
            str(worker.epoch),
            str(worker.pid),
            Text(printable(worker.node)),
            str(stats.waiting),
            str(stats.running),
            _share([stats.kv_blocks_used], [stats.kv_blocks_total]),
            _share([stats.prefix_hit_tokens], [stats.prefix_query_tokens]),
            f"{stats.transfers} ({stats.transfer_bytes / _MIB:.1f} MiB)",
            _rate(stats.transfer_bytes, stats.transfer_seconds),
            str(stats.transfer_failures),
            f"{stats.step_ms:.1f} ms",
        )
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _share(part: Iterable[float], whole: Iterable[float]) -> str:
    total = sum(whole)
    return f"{100 * sum(part) / total:.0f} %" if total else "-"


def _rate(count_bytes: float, duration_s: float) -> str:
    return f"{count_bytes / _MIB / duration_s:.0f} MiB/s" if duration_s else "-"
