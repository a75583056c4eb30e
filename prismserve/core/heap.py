"""Garbage collection in a process that serves."""

from __future__ import annotations

import gc


def settle() -> None:
    """Collect what is garbage and spare all else that there is now from later collections; ``gc.unfreeze`` undoes it.

    Libraries, models and tokenizers are hundreds of thousands of objects that live as long as the process. A full
    collection that goes through them stops everything for most of a second, and a crowd of requests that ends brings one
    about. To be called once a process has loaded what it serves with.
    """
    gc.collect()
    gc.freeze()
