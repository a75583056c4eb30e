"""The vocabulary every package speaks: types, errors, hashing, configuration base.

Imports the standard library and pydantic only. Every other package may import it.
"""
