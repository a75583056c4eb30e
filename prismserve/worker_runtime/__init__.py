"""What every worker process has, whatever its role: engine loop, arena, sessions with routers, peers, registration.

The prefill and decode rooms add their jobs to it. May import ``engine``, ``kv_transfer`` and below; never Ray.
"""
