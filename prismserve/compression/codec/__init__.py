"""Encodings of KV on the wire; one file each, the file name is the codec name."""
