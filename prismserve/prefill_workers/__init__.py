"""The prefill role: compute a prompt's KV and push it, layer by layer, to the decode worker that waits for it.

May import ``worker_runtime`` and below.
"""
