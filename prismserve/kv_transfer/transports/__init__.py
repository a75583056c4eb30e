"""Ways to move bytes into a peer's arena, one file each: the file name is the transport's name.

A file exports its class as ``TRANSPORT``; :mod:`prismserve.kv_transfer.transports.base` says what it must do.
"""
