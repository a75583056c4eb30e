"""Protobuf schemas and their generated stubs: the public ``Generate`` service and the workers' data plane.

Sits directly above ``core``. Regenerate with ``make proto``; a test checks that the committed code is current.
"""
