from __future__ import annotations

import subprocess
import sys


def test_the_engine_imports_no_cluster_network_or_store_package() -> None:
    script = (
        "import sys, pkgutil, importlib, prismserve.engine as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'prismserve.engine.{module.name}')\n"
        "print(sorted({'ray', 'redis', 'grpc', 'nixl', 'fastapi', 'httpx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
