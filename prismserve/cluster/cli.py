"""The ``prismserve`` command line. A command is a file in ``commands/`` with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from typing import TYPE_CHECKING

from prismserve.cluster.signals import deferred

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "serve": "start a cluster and stay up",
    "chat": "ask about images in the terminal",
    "status": "show pools, queues, caches and transfer rates of a running cluster",
    "presets": "show which presets are in force and what they do, hold one back or release it",
    "keys": "make an API key for a tenant",
    "doctor": "check this machine and say what to do",
    "methods": "list the compression methods",
    "explain": "draw which patches of an image a compression method keeps, merges and drops",
    "version": "print the version",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="prismserve", description="Serve large vision-language models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == chosen:  # only the chosen command is imported: `version` must not wait for torch
            with deferred(signal.SIGINT, signal.SIGTERM):
                module = importlib.import_module(f"prismserve.cluster.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
