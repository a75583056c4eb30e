"""The global prefix index and the worker registry: who is alive, and who holds which block or image embedding.

Everything the index says is a hint; the owner of a block holds the truth. A stale entry costs a miss, never a wrong
answer, and an unreachable index costs hit rate, never a request. ``base`` is the interface, ``memory`` and ``redis``
implement it, ``mirror`` is the local copy that routing reads, ``lease`` keeps one worker registered and announced,
``embedded`` runs a private server. The only package that may import ``redis``.
"""
