"""The front doors and the life of a request: limits, validation, placement, streaming, migration.

``policy.py``, ``sampling.py``, ``text.py`` and most of ``media.py`` are pure; sockets live in ``sessions.py``,
``servers.py``, ``openai.py`` and ``grpc_server.py``. May import ``models``, ``compression``, ``kv_transfer.index``,
``protocol`` and ``core``; never a worker package, the client or the cluster.
"""
