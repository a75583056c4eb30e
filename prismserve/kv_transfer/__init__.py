"""KV moved between workers: arenas, leases, transports, sending, receiving, manifests; and the index of who holds what.

A receiver grants a lease on pages of its arena, a sender writes encoded KV there layer by layer, and the receiver
verifies every payload before it reaches the KV pool. May import ``compression``, ``kernels`` and ``core``; never
``engine``, ``models`` or ``ray``. ``redis`` only in ``index``, ``nixl`` only in ``transports``.
"""
