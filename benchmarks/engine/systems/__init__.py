"""One process per system: a server that answers work given on standard input, and the client that starts it.

The servers run in their system's own virtual environment, so they import nothing of prismserve (save its own server)
and ``wire`` stands on the standard library alone.
"""
