from __future__ import annotations

import json

from benchmarks import focus


def test_it_compares_times_and_writes(tmp_path, capsys):
    assert focus.main(["--contexts", "40,64", "--shares", "0.5,0.1", "--repeats", "2", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "focus.json").read_text())["rows"]
    assert [(row["context"], row["share"]) for row in rows] == [(c, s) for c in (40, 64) for s in (1.0, 0.5, 0.1)]
    assert all(row["attention_ms"] > 0 for row in rows)
    assert (tmp_path / "focus.md").read_text() == capsys.readouterr().out
