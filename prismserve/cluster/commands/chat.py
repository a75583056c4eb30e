"""``prismserve chat FILE… "question"``: ask a running cluster by gRPC, and print the answer as it arrives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prismserve.client import Client, ClientError
from prismserve.cluster.commands.connection import (
    EXIT_HELP,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_REQUEST,
    add_connection_arguments,
    exit_code,
    explain,
    printable,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from prismserve.client import Usage
    from prismserve.client.requests import GenerateOptions


_VIDEO_SUFFIXES: Final = frozenset({".mp4", ".m4v", ".webm"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = __doc__
    parser.epilog = EXIT_HELP
    parser.add_argument(
        "inputs", nargs="+", metavar="FILE… QUESTION", help="PNG, JPEG, WebP, MP4 or WebM files, then the question"
    )
    add_connection_arguments(parser, timeout_s=120.0)
    parser.add_argument("--model", default="", help="served model name (default: the only one)")
    parser.add_argument(
        "--compression", metavar="PRESET", help='preset, method name or JSON plan; "off" is exact (default: server\'s)'
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 always takes the likeliest (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the random stream, with a temperature above 0")
    parser.add_argument("--show-usage", action="store_true", help="print what the answer cost, to standard error")


def run(args: argparse.Namespace) -> int:
    """Ask, print, and return the exit code (see ``--help``)."""
    *images, question = args.inputs
    mistake = _mistake(images, question)
    if mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return EXIT_REQUEST
    try:
        with Client(args.target, api_key=args.api_key, timeout_s=args.timeout_s) as client:
            return _converse(client, args, images, question)
    except ClientError as error:
        print(f"error: {explain(error, args.target)}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED


def _mistake(images: Sequence[str], question: str) -> str:
    """What is wrong with the positional arguments, or nothing."""
    missing = [image for image in images if not Path(image).is_file()]
    if missing:
        return f"{missing[0]} is not a file; every argument before the question is an image or a video"
    if not question.strip():
        return "the question is empty"
    if Path(question).is_file():
        return f"the question is missing: the last argument, {question}, is a file"
    return ""


def _is_video(path: str) -> bool:
    return Path(path).suffix.lower() in _VIDEO_SUFFIXES


def _converse(client: Client, args: argparse.Namespace, images: Sequence[str], question: str) -> int:
    options: GenerateOptions = {
        "images": [path for path in images if not _is_video(path)],
        "videos": [path for path in images if _is_video(path)],
        "model": args.model,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
    }
    if args.compression is not None:
        options["compression"] = args.compression
    if args.seed is not None:
        options["seed"] = args.seed
    turns = [{"role": "system", "content": args.system}] if args.system else []
    usage: Usage | None = None
    for delta in client.stream([*turns, {"role": "user", "content": question}], **options):
        print(printable(delta.text), end="", flush=True)
        usage = delta.usage or usage
    print()
    if args.show_usage and usage is not None:
        print(usage_text(usage), file=sys.stderr)
    return EXIT_OK


def usage_text(usage: Usage) -> str:
    """What an answer cost, in a few lines."""
    plan = json.loads(usage.compression) if usage.compression.startswith("{") else {"preset": usage.compression}
    asked = plan.get("stepped_back_from")
    compression = f"{plan['preset']}, in place of {asked}" if asked else plan["preset"]
    sent = f"{usage.kv_bytes_sent / 1024:.1f} KiB by {usage.transport}" if usage.kv_bytes_sent else "none"
    visual = f"{usage.visual_tokens_before} before, {usage.visual_tokens_after} after compression"
    kv = f"{usage.kv_bytes_before / 1024:.1f} KiB before, {usage.kv_bytes_after / 1024:.1f} KiB after"
    parts = f"queue {usage.queue_ms:.1f}, encode {usage.encode_ms:.1f}, prefill {usage.prefill_ms:.1f}"
    lines = {
        "tokens": f"{usage.prompt_tokens} in ({usage.cached_tokens} cached), {usage.completion_tokens} out",
        "images": f"{usage.images}, {usage.images_cached} of them from the cache",
        "videos": f"{usage.videos}, {usage.frames} frames",
        "visual tokens": f"{visual} ({compression or 'off'})",
        "KV": f"{kv}, sent: {sent}",
        "first token": f"{usage.ttft_ms:.1f} ms ({parts}, exposed transfer {usage.transfer_exposed_ms:.1f})",
        "workers": f"prefill {usage.prefill_worker}, decode {usage.decode_worker} ({usage.route_reason})",
    }
    return printable("\n".join(f"{name:<14} {text}" for name, text in lines.items()))
