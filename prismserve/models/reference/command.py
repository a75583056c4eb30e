"""How the training commands are carried out."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

import torch

from prismserve.core.errors import PrismServeError


def carry_out(run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Log to standard output, use ``arguments.threads`` threads, seed, run.

    Returns:
        The exit status: 1, with one sentence on standard error, if the arguments cannot be carried out.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    try:
        run(arguments)
    except PrismServeError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0
