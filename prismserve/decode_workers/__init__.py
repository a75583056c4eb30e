"""The decode role: receive a request's KV, verify it, join it to the running batch, stream.

May import ``worker_runtime`` and below.
"""
