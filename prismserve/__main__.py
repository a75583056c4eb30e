"""``python -m prismserve``."""

from __future__ import annotations

from prismserve.cluster.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
