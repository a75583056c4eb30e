"""Kernels in C++ for the processor, compiled on the machine that runs them; see :mod:`prismserve.kernels.native.build`.

Ops call :func:`prismserve.kernels.native.library.library` and know their functions' arguments; nobody else does.
"""
