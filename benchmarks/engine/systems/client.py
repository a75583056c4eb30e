"""Start a system in a process of its own and give it work; see ``wire`` for the protocol."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from benchmarks.engine.systems.wire import Job

ROOT: Final = Path(__file__).resolve().parents[3]
START_TIMEOUT_S: Final = 900.0
RUN_TIMEOUT_S: Final = 900.0
_STOP_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Variant:
    """One system in one dtype.

    Attributes:
        system: as ``--peer`` names it, or ``prismserve``.
        dtype: as the system's server takes it.
        python: the interpreter of its environment.
        environment: variables it needs beside those of this process.
    """

    system: str
    dtype: str
    python: Path
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Of the table's column."""
        return f"{self.system} {self.dtype}"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one run.

    Attributes:
        answers: (token ids, seconds since the work was handed over) of each job.
        wall_s: until the last token.
        more: what else the server reported.
    """

    answers: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]
    wall_s: float
    more: Mapping[str, Any]

    @property
    def ttft_s(self) -> float:
        """Until the first token of the first job."""
        return self.answers[0][1][0]

    @property
    def tpot_s(self) -> float:
        """Mean time between tokens after the first, of the first job."""
        at_s = self.answers[0][1]
        return (at_s[-1] - at_s[0]) / (len(at_s) - 1)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of all jobs over the whole time, prompts included."""
        return sum(len(ids) for ids, _ in self.answers) / self.wall_s


class System:
    """A running server; a context manager that ends it."""

    def __init__(self, variant: Variant, directory: Path, threads: int, log: Path) -> None:
        """Start ``variant`` on a checkpoint with its standard error in ``log``; RuntimeError says why it cannot."""
        self.variant = variant
        self._log = log
        module = f"benchmarks.engine.systems.serve_{variant.system.partition('-')[0]}"
        command = [str(variant.python), "-m", module, str(directory), variant.dtype, str(threads)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **dict(variant.environment),
        }
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        self._pending = b""
        try:
            self.about: Mapping[str, Any] = self._read(START_TIMEOUT_S)["ready"]
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[Job]) -> Result:
        """Answer jobs, all at once; RuntimeError if the system fails or takes too long."""
        assert self._process.stdin is not None  # noqa: S101 - opened as a pipe
        line = json.dumps({"jobs": [asdict(job) for job in jobs]}) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            message = f"{self.variant.name} ended by itself; see {self._log}"
            raise RuntimeError(message) from None
        message = self._read(RUN_TIMEOUT_S)
        answers = tuple((tuple(answer["ids"]), tuple(answer["at_s"])) for answer in message.pop("answers"))
        result = Result(answers, message.pop("wall_s"), message)
        if any(
            len(ids) != job.tokens or len(at_s) != job.tokens for (ids, at_s), job in zip(answers, jobs, strict=True)
        ):
            text = (
                f"{self.variant.name} gave {[len(ids) for ids, _ in answers]} tokens, asked for {jobs[0].tokens} each"
            )
            raise RuntimeError(text)
        return result

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            # What was not written yet is of no use to a server that has ended.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_TIMEOUT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        """The next line, without help of a thread, so that nothing here runs while a system is timed."""
        assert self._process.stdout is not None  # noqa: S101 - opened as a pipe
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                message = f"{self.variant.name} did not answer within {timeout_s:.0f} s; see {self._log}"
                raise RuntimeError(message)
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                message = f"{self.variant.name} ended by itself; see {self._log}"
                raise RuntimeError(message)
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        value: dict[str, Any] = json.loads(line)
        if "error" in value:
            message = f"{self.variant.name} failed: {value['error']}; see {self._log}"
            raise RuntimeError(message)
        return value


def variants_of(
    system: str, dtypes: Sequence[str], cache: Path, vllm_python: Path | None, threads: int
) -> tuple[Variant, ...]:
    """The dtypes a system is tried in. Ours is what ``--dtype auto`` takes; of a peer's ``dtypes``, its faster figures count."""
    if system == "prismserve":
        return (Variant(system, "auto", Path(sys.executable)),)
    if system == "transformers":
        return tuple(Variant(system, dtype, Path(sys.executable)) for dtype in dtypes)
    from benchmarks.engine.environments import vllm_environment, vllm_variables

    python = vllm_environment(cache / "vllm") if vllm_python is None else vllm_python
    variables = tuple(vllm_variables(python, threads).items())
    return tuple(Variant(system, dtype, python, variables) for dtype in dtypes)
