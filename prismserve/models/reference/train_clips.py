r"""Train the bundled model for clips on a CPU: the decoder, behind the vision tower and projector as they are.

Run it with::

    python -m prismserve.models.reference.train_clips --out OUT [--steps N] [--minutes M]
    python -m prismserve.models.reference.train_clips --out OUT --smoke

A run that is cut off goes on from ``OUT/training.pt`` when it is started again. ``OUT`` is then a checkpoint directory
that serves, ``OUT/decoder.safetensors`` is what training changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from prismserve.models.reference.clip_model import TRAINED_FILE, load, write_checkpoint
from prismserve.models.reference.clip_stage import ClipOptions, Trainer
from prismserve.models.reference.command import carry_out

_SMOKE: Final = ClipOptions(steps=4, batch=3, fresh=2, warmup_steps=1, report_steps=1, save_steps=2, validation_clips=2)


def run(arguments: argparse.Namespace) -> None:
    """Carry out parsed arguments."""
    out: Path = arguments.out
    model, tokenizer = load(write_checkpoint(out, arguments.init))
    options = _SMOKE
    if not arguments.smoke:
        options = ClipOptions(
            steps=arguments.steps,
            minutes=arguments.minutes,
            batch=arguments.batch,
            rate=arguments.lr,
            first_seed=arguments.first_seed,
            fresh=arguments.fresh,
            drilled=arguments.drilled,
            choice=arguments.choice,
        )
    Trainer(model, tokenizer, out, options).train()
    write_checkpoint(out, out / TRAINED_FILE)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    default = ClipOptions()
    out = argparse.ArgumentParser(
        prog="python -m prismserve.models.reference.train_clips", description=__doc__.split("\n")[0]
    )
    out.add_argument("--out", required=True, type=Path, help="directory for the model and the state of training")
    out.add_argument("--smoke", action="store_true", help="a few steps, nothing learned")
    out.add_argument("--init", type=Path, help="start from this decoder.safetensors, not from the bundled decoder")
    out.add_argument("--steps", type=int, default=default.steps, help="at most so many (default: %(default)s)")
    out.add_argument("--minutes", type=float, default=default.minutes, help="end early, annealed")
    out.add_argument("--batch", type=int, default=default.batch, help="clips a step (default: %(default)s)")
    out.add_argument("--lr", type=float, default=default.rate, help="peak rate (default: %(default)s)")
    out.add_argument("--first-seed", type=int, default=default.first_seed, help="first clip (default: %(default)s)")
    out.add_argument("--fresh", type=int, default=default.fresh, help="new ones among them (default: %(default)s)")
    out.add_argument(
        "--drilled", type=float, default=default.drilled, help="clips asked about time (default: %(default)s)"
    )
    out.add_argument("--choice", type=int, default=default.choice, help="clips to choose from (default: %(default)s)")
    out.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, seed, run; 1 with one sentence on standard error if the arguments cannot be carried out."""
    command = parser()
    parsed = command.parse_args(arguments)
    counts = (parsed.steps, parsed.batch, parsed.first_seed, parsed.choice, parsed.threads)
    if min(counts) < 1 or not parsed.minutes > 0:
        command.error("--steps, --batch, --first-seed, --choice, --threads and --minutes must be above 0")
    if not (parsed.lr > 0 and 1 <= parsed.fresh <= parsed.batch and 0 <= parsed.drilled <= 1):
        command.error("--lr must be above 0, --fresh between 1 and --batch, and --drilled between 0 and 1")
    return carry_out(run, parsed)


if __name__ == "__main__":
    sys.exit(main())
