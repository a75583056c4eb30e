"""Tensor operations, one folder per op; ``reference.py`` in each says in plain PyTorch what is right.

The folder's ``__init__`` re-exports the op, so callers import ``prismserve.kernels.<op>`` and never an
implementation. May import ``torch`` and ``core``.
"""
