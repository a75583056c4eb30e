"""The fidelity guard: a share of compressed requests is replayed without compression, and presets that fail step back.

Decisions (``compare``, ``judge``, ``queue``) are plain data with a clock and a random source passed in; ``guard`` has the
effects. May import the rest of the router but its front doors.
"""
