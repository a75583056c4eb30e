"""What the commands that talk to a running cluster share: its address, and the exit code of each failure."""

from __future__ import annotations

import os
import unicodedata
from typing import TYPE_CHECKING, Final

from prismserve.client import (
    AuthenticationError,
    BadRequestError,
    ClientError,
    NotFoundError,
    OverloadedError,
    RequestError,
    TimeoutExceededError,
    UnavailableError,
)
from prismserve.client.channel import DEFAULT_TARGET
from prismserve.cluster.settings import API_KEY_VARIABLE, client_api_key

if TYPE_CHECKING:
    import argparse

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_REQUEST: Final = 2
EXIT_UNAVAILABLE: Final = 3
EXIT_TIMEOUT: Final = 4
EXIT_INTERRUPTED: Final = 130
EXIT_HELP: Final = (
    "exit codes: 0 done; 1 the cluster failed; 2 the request is wrong; 3 no cluster answers there, or it is full; "
    "4 the deadline passed; 130 interrupted"
)

_DIRECTIONS: Final = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
_CODES: Final[tuple[tuple[type[ClientError], int], ...]] = (
    (RequestError, EXIT_REQUEST),
    (BadRequestError, EXIT_REQUEST),
    (NotFoundError, EXIT_REQUEST),
    (AuthenticationError, EXIT_REQUEST),
    (UnavailableError, EXIT_UNAVAILABLE),
    (OverloadedError, EXIT_UNAVAILABLE),
    (TimeoutExceededError, EXIT_TIMEOUT),
)


def add_connection_arguments(parser: argparse.ArgumentParser, *, timeout_s: float) -> None:
    """Add ``--grpc`` (or ``--url``) and ``--timeout-s``."""
    parser.add_argument(
        "--grpc",
        "--url",
        dest="target",
        default=DEFAULT_TARGET,
        metavar="HOST:PORT",
        help="gRPC address of the cluster (default: %(default)s)",
    )
    parser.add_argument(
        "--api-key",
        default=client_api_key(os.environ),
        metavar="KEY",
        help=f"for a cluster that asks for one (default: the environment variable {API_KEY_VARIABLE})",
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=timeout_s,
        metavar="SECONDS",
        help="deadline, in seconds (default: %(default)s)",
    )


def exit_code(error: ClientError) -> int:
    """The exit code of a failed call."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), EXIT_FAILURE)


def explain(error: ClientError, target: str) -> str:
    """One sentence for the terminal; says how to start a cluster when none answers."""
    if isinstance(error, UnavailableError):
        return f"no cluster answers at {target} ({printable(error.message)}); start one with `prismserve serve`"
    return printable(error.message)


def printable(text: str) -> str:
    """Text without control and direction-changing characters: an answer must not drive the terminal."""
    return "".join(character for character in text if character in "\n\t" or not _drives_terminal(character))


def _drives_terminal(character: str) -> bool:
    return unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in _DIRECTIONS
