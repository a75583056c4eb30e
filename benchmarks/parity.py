"""Every family against transformers on small random weights: the matrix of family, case and outcome.

Run ``python -m benchmarks.parity``; ``--seeds``, ``--tokens`` and ``--family`` narrow or widen it. Each cell is the
largest difference of any logit over all generated tokens and seeds, in float32, with prompts of all cases in one batch
that is prefilled in chunks. ``bf16`` is the largest total variation between first-token distributions in bfloat16 and
in float32. The command fails if any token differs or any logit by more than 1e-4.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from tests.models.matching import CASES, VIDEO_CASES, Ours, Theirs
from tests.models.zoo import SPECIMENS

_LOGIT_TOLERANCE = 1e-4
_STEP_TOKENS = 29


def compare(family: str, seed: int, tokens: int) -> dict[str, float]:
    """Largest logit difference by case, infinite where a token differs, and the bfloat16 distance under ``bf16``."""
    specimen = SPECIMENS[family]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        # Seeds also walk through the key layouts and the number of shards.
        model = specimen.save(directory, seed, older=seed % 2 == 1, shards=1 + seed % 3)
        ours = Ours(directory)
        theirs = Theirs(specimen, model, ours.processor)
        requests = [ours.request(name, case, tokens) for name, case in theirs.cases.items()]
        answers = ours.run(requests, max_step_tokens=_STEP_TOKENS)
        rounded = Ours(directory, dtype="bfloat16")
        rounded.run([rounded.request(name, case, 1) for name, case in theirs.cases.items()])
        distances: dict[str, float] = {}
        for name, case in theirs.cases.items():
            expected, logits = theirs.generate(case, tokens)
            gap = (torch.stack(ours.logits[name]) - logits.float()).abs().max().item()
            distances[name] = gap if answers[name] == expected else float("inf")
            first = ours.logits[name][0].softmax(-1) - rounded.logits[name][0].softmax(-1)
            distances["bf16"] = max(distances.get("bf16", 0.0), first.abs().sum().item() / 2)
    return distances


def main() -> int:
    """Print the matrix; 1 if a cell fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=sorted(SPECIMENS), help="only this one; may be repeated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    disable_progress_bar()
    columns = (*CASES, *VIDEO_CASES, "bf16")
    table = Table(
        "family", *columns, title=f"{options.seeds} seeds, {options.tokens} greedy tokens, largest difference"
    )
    failed = 0
    for family in options.family or SPECIMENS:
        results = [compare(family, seed, options.tokens) for seed in range(options.seeds)]
        worst = {column: max(result[column] for result in results) for column in results[0]}
        cells = []
        for column in columns:
            if column not in worst:
                cells.append("")
                continue
            passed = column == "bf16" or worst[column] <= _LOGIT_TOLERANCE
            failed += not passed
            outcome = f"{'pass' if passed else 'FAIL'} {worst[column]:.1e}"
            cells.append(f"{worst[column]:.3f}" if column == "bf16" else outcome)
        table.add_row(family, *cells)
    Console(width=140).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
