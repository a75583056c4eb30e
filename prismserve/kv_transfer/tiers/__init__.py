"""Tiers below a worker's device memory: host RAM, then a file on NVMe. They hold whole blocks by key, checksummed.

Stores know nothing of engines, networks or requests; ``worker_runtime/tiering.py`` connects them.
"""
