"""Paged KV cache, scheduler, model runner and sampler of one worker.

Imports ``torch``, ``numpy``, ``pydantic``, Pillow and the packages below it (``compression``, ``models``,
``kernels``, ``core``). No Ray, no network, no Redis: it runs alone on one machine.
"""
