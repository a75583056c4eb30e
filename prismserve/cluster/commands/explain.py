"""``prismserve explain IMAGE "question"``: draw which patches a compression method keeps, merges and drops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from prismserve.core.errors import ConfigurationError, InvalidRequestError, PrismServeError

if TYPE_CHECKING:
    import argparse

    from prismserve.compression.explanation import Explanation
    from prismserve.core.types import Request

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_REQUEST = 2
_SPARE_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Draw which patches of an image a compression method keeps, merges and drops. Runs in this process; no cluster "
        "is needed."
    )
    parser.epilog = "exit codes: 0 done; 1 the model cannot be loaded or run; 2 the request is wrong"
    parser.add_argument("image", metavar="IMAGE", help="PNG, JPEG or WebP file")
    parser.add_argument("question", metavar="QUESTION", help="what is asked about it")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--method", metavar="NAME", help="visual or prefill method (`prismserve methods` lists them)")
    chosen.add_argument("--compression", metavar="PLAN", help="preset, or JSON object as requests have it")
    parser.add_argument(
        "--keep", metavar="N", help="with --method: tokens kept, a count (49) or a share (0.25) (default: the method's)"
    )
    parser.add_argument(
        "--stage", choices=("visual", "prefill"), help="with --method: which one, where both stages have the name"
    )
    parser.add_argument(
        "--model", default="reference", metavar="DIR", help="checkpoint directory or hub name (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="auto", metavar="TYPE", help="of the weights (default: %(default)s)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="of the model (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("explain.png"), metavar="FILE", help="the picture (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the fate of every token as JSON")


def run(args: argparse.Namespace) -> int:
    """Explain, draw, print, and return the exit code (see ``--help``)."""
    from prismserve.compression import presets

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        asked = _asked(args)
        presets.resolve(asked, "off")  # refuses a wrong plan before a model is loaded for it
        data = _read(Path(args.image))
        request, explanation = asyncio.run(_explained(args, data, asked))
        _draw(request, explanation, args.out)
    except InvalidRequestError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return EXIT_REQUEST
    except PrismServeError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return EXIT_FAILURE
    if args.json:
        from prismserve.router.overlays import document

        print(json.dumps(document(request.compression, explanation), indent=2))
    else:
        _show(explanation, Console(highlight=False, soft_wrap=True))
        print(f"written to {args.out}")
    return EXIT_OK


def _asked(args: argparse.Namespace) -> Any:
    """The request's field ``compression``; InvalidRequestError says what is wrong with the arguments."""
    if args.method is None:
        if args.keep is not None or args.stage is not None:
            message = "--keep and --stage go with --method; a plan has its own"
            raise InvalidRequestError(message)
        if not args.compression.lstrip().startswith("{"):
            return args.compression
        try:
            return json.loads(args.compression)
        except json.JSONDecodeError as error:
            message = f"--compression is not JSON: {error.msg}"
            raise InvalidRequestError(message) from None
    from prismserve.compression import loader

    stages = [stage for stage in ("visual", "prefill") if args.method in loader.names(stage)]
    stage = args.stage or (stages[0] if stages else "visual")
    part: dict[str, Any] = {"method": args.method}
    if args.keep is not None:
        part["keep"] = _number(args.keep)
    return {"preset": "off", stage: part}


def _number(text: str) -> int | float:
    """A count or a share."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return float(text)
    message = f"--keep must be a count or a share, not {text!r}"
    raise InvalidRequestError(message)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"{path} cannot be read: {(error.strerror or str(error)).lower()}"
        raise InvalidRequestError(message) from None


async def _explained(args: argparse.Namespace, data: bytes, asked: Any) -> tuple[Request, Explanation]:
    """Load the model, build the request as a router would, and explain it."""
    from prismserve.core.types import KVLayout
    from prismserve.engine.config import EngineConfig
    from prismserve.engine.engine import Engine
    from prismserve.engine.explaining import explain
    from prismserve.models.loader import encoder_fingerprint, load_model
    from prismserve.models.processing import ChatMessage, ImageSlot, Processor
    from prismserve.models.source import resolve_model
    from prismserve.router.calls import Call
    from prismserve.router.config import RouterConfig
    from prismserve.router.media import ImageSource, MediaReader
    from prismserve.router.requests import ModelFacts, RequestBuilder

    directory = resolve_model(args.model)
    processor = Processor.from_directory(directory)
    model = load_model(directory, dtype=args.dtype, device=args.device, progress=None)
    decoder, config = model.decoder.config, EngineConfig()
    layout = KVLayout(
        str(model.dtype).removeprefix("torch."),
        decoder.layers,
        decoder.kv_heads,
        decoder.head_dim,
        config.block_tokens,
        decoder.position_scheme,
    )
    encoder = encoder_fingerprint(model.fingerprint)
    facts = ModelFacts(Path(args.model).name, model.fingerprint, encoder, layout, model.max_model_len)
    call = Call(
        options={"max_tokens": 1, "temperature": 0},
        messages=(ChatMessage("user", (ImageSlot(0), args.question)),),
        media=(ImageSource(data, "image"),),
        compression=asked,
    )
    media = MediaReader(RouterConfig())
    builder = RequestBuilder(processor, facts, RouterConfig(), media, "off")
    try:
        request = (await builder.build(call)).request
    finally:
        builder.close()
        media.close()
    # Room for this one prompt.
    length = min(model.max_model_len, request.prompt.raw_tokens + _SPARE_TOKENS)
    room = 2 * (length + layout.block_tokens) * layout.token_bytes
    engine = Engine(model, processor, EngineConfig(max_model_len=length, kv_cache_bytes=room, cuda_graphs=False))
    try:
        return request, explain(engine, request)
    finally:
        engine.constraints.close()


def _draw(request: Request, explanation: Explanation, target: Path) -> None:
    from prismserve.router.overlays import overlay

    png = overlay(request.media, explanation)
    try:
        target.write_bytes(png)
    except OSError as error:
        message = f"{target} cannot be written: {(error.strerror or str(error)).lower()}"
        raise ConfigurationError(message, field="out") from None


def _show(explanation: Explanation, console: Console) -> None:
    """The stages as a table, and the patches as characters."""
    from prismserve.compression.explanation import patch_map

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("stage", "tokens", "kept", "merged", "dropped"):
        table.add_column(heading)
    before = explanation.places
    for stage in explanation.stages:
        table.add_row(stage.title, str(before), str(stage.kept), str(stage.merged), str(stage.dropped))
        before = stage.kept
    console.print(table)
    lines = patch_map(explanation)
    if lines:
        several = len(explanation.stages) > 1
        left = "a number: left in that stage" if several else "+ merged   . dropped"
        console.print(f"\n# kept   {left}\n")
        console.print("\n".join(lines))
