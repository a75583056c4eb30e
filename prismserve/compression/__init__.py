"""Compression methods, one file each, found by name: ``visual`` (an image's tokens) and ``codec`` (bytes on the wire).

Methods are pure: they plan over tensors, the engine and the transfer layer apply the plans. May import ``kernels``
and ``core``.
"""
