"""What tests of faults share, and the table they print: one line per fault of ``docs/faults.md``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from prismserve.kv_transfer.index.embedded import EmbeddedServer
from tests.chaos.table import FAULTS, Row, rows
from tests.chaos.worlds import ProcessWorld
from tests.worker_runtime.conftest import open_world

__all__ = ["open_world"]

_reports: defaultdict[str, list[pytest.TestReport]] = defaultdict(list)
_broken = False


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def process_world() -> AsyncIterator[Callable[[], ProcessWorld]]:
    """Makes worlds whose workers are processes, over one index server."""
    worlds: list[ProcessWorld] = []
    with EmbeddedServer() as server:

        def make() -> ProcessWorld:
            worlds.append(ProcessWorld(server.url, f"chaos-{len(worlds)}"))
            return worlds[-1]

        yield make
        for world in worlds:
            await world.close()


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Iterator[Callable[..., None]]:
    """Notes figures for the table: ``measured(gap_s=0.4)``."""

    def note(**figures: float) -> None:
        for name, value in figures.items():
            record_property(name, f"{value:.3g}")

    return note


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that stands in the table, wherever it is."""
    named = {test for row in rows(FAULTS) for test in row.tests}
    for item in items:
        if item.nodeid.partition("[")[0] in named:
            item.add_marker("fault")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _reports[report.nodeid.partition("[")[0]].append(report)


def _line(row: Row) -> tuple[str, dict[str, bool]]:
    reports = [report for test in row.tests for report in _reports[test]]
    outcomes = {report.outcome for report in reports}
    outcome = next((name for name in ("failed", "skipped", "passed") if name in outcomes), "not run")
    if outcome == "skipped" and "passed" in outcomes:
        outcome = "partly"
    seconds = sum(report.duration for report in reports)
    figures = [f"{name} {value}" for report in reports for name, value in report.user_properties]
    reasons = sorted({str(report.longrepr[2]) for report in reports if report.skipped and report.longrepr})
    notes = "".join(f" [{note}]" for note in ("; ".join(figures), "; ".join(reasons)) if note)
    markup = {"green": outcome == "passed", "red": outcome == "failed", "yellow": outcome not in ("passed", "failed")}
    checks = f"{len(reports)} check{'s' * (len(reports) != 1)}"
    return f"{outcome:<8}{checks:>10}{seconds:8.1f} s  {row.inject} -> {row.holds}{notes}", markup


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """After a run with faults: one line for each."""
    if not any(test.startswith("tests/chaos/") for test in _reports):
        return
    terminalreporter.section("faults")
    for row in rows(FAULTS):
        line, markup = _line(row)
        terminalreporter.write_line(line, **markup)
