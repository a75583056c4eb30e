"""The commands of ``prismserve``, one file each: ``add_arguments(parser)`` and ``run(args) -> int`` (the exit code)."""
