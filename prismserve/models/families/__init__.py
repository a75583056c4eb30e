"""Model families: one file each, which exports a :class:`prismserve.models.base.Family` as ``FAMILY``.

A family is found by the architectures it declares; there is no registry to edit.
"""
