"""Generate ``prismserve/protocol/*_pb2*.py`` from ``prismserve/protocol/schema``.

python scripts/generate_protocol.py [OUTPUT_FOLDER]
"""

from __future__ import annotations

import re
import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "prismserve" / "protocol" / "schema"


def generate(output: Path) -> None:
    """Write the stubs into ``output``; imports are made package-absolute."""
    for schema in sorted(SCHEMA.glob("*.proto")):
        include = resources.files("grpc_tools") / "_proto"
        status = protoc.main(
            [
                "protoc",
                f"-I{SCHEMA}",
                f"-I{include}",
                f"--python_out={output}",
                f"--pyi_out={output}",
                f"--grpc_python_out={output}",
                schema.name,
            ]
        )
        if status != 0:
            message = f"protoc failed on {schema.name} with status {status}"
            raise SystemExit(message)
    for stub in output.glob("*_pb2_grpc.py"):
        text = re.sub(
            r"^import (\w+_pb2) as", r"from prismserve.protocol import \1 as", stub.read_text(), flags=re.MULTILINE
        )
        stub.write_text(text)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else SCHEMA.parent)
