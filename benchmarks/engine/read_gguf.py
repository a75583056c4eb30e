"""Tensors and metadata of a GGUF file as plain files: ``python read_gguf.py FILE FOLDER``.

Runs where the ``gguf`` package is installed, which is not the project's own environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize


def main() -> int:
    """Write ``tensors.npz`` (float32, rows first) and ``metadata.json``."""
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    reader = GGUFReader(source)
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    np.savez(folder / "tensors.npz", **tensors)
    about = {name: field.contents() for name, field in reader.fields.items()}
    (folder / "metadata.json").write_text(json.dumps(about), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
