"""The tables of faults and hostile inputs are whole: every row has tests, and every test of a fault stands in a row."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.chaos.table import FAULTS, HOSTILE, ROOT, rows

ROWS = rows()


def ids_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = (node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {f"{path.relative_to(ROOT)}::{name}" for name in found if name.startswith("test_")}


def test_both_tables_are_read():
    assert len(rows(FAULTS)) == 17
    assert len(rows(HOSTILE)) == 18


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.inject[:40])
def test_every_row_names_tests_that_exist(row):
    assert row.tests
    missing = [test for test in row.tests if test not in ids_in(ROOT / test.partition("::")[0])]
    assert missing == []


@pytest.mark.parametrize("folder", ["chaos", "security"])
def test_every_test_of_a_fault_stands_in_a_row(folder):
    named = {test for row in ROWS for test in row.tests}
    found = set().union(*(ids_in(path) for path in (ROOT / "tests" / folder).glob("test_*.py")))
    assert found - named == set()
