"""The benchmark of KV formats, on a question of each family."""

from __future__ import annotations

import json

from benchmarks import kv_dtype
from prismserve.models.reference.scenes import FAMILIES


def test_a_small_run_writes_a_row_for_every_format(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(kv_dtype, "FORMATS", ("auto", "int4"))
    assert kv_dtype.main(["--per-family", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "kv_dtype.json").read_text())["rows"]
    assert [row["kv_cache_dtype"] for row in rows] == ["auto", "int4"]
    assert rows[0]["same"] == rows[0]["total"]["asked"] == len(FAMILIES)
    assert rows[0]["total"]["right"] >= len(FAMILIES) - 2
    assert rows[1]["token_bytes"] * 256 == rows[0]["token_bytes"] * 36
    table = (tmp_path / "kv_dtype.md").read_text()
    assert table.count("\n| `") == len(rows)
    assert "14.1%" in table
