"""One end of a Mooncake TCP transfer. Run by path under the interpreter of Mooncake's environment; imports nothing of ours.

Lines of JSON on standard input and output: it tells its session and the address of its memory, then answers
``{"peer", "address", "nbytes", "writes"}`` with the seconds of each write.
"""

import ctypes
import json
import os
import sys
import time

from mooncake.engine import TransferEngine  # type: ignore[import-not-found] # in an environment of its own


def main() -> None:
    """Serve until standard input closes."""
    os.sched_setaffinity(0, {int(number) for number in sys.argv[2].split(",")})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine's log must not disturb the answers
    memory = bytearray(int(sys.argv[1]))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        sys.exit("Mooncake's engine could not be initialised")
    if engine.register_memory(address, len(memory)):
        sys.exit("Mooncake's engine could not register its memory")
    print(json.dumps({"peer": f"127.0.0.1:{engine.get_rpc_port()}", "address": address}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        seconds = []
        for _ in range(asked["writes"]):
            began = time.perf_counter()
            if engine.transfer_sync_write(asked["peer"], address, asked["address"], asked["nbytes"]):
                sys.exit("a write of Mooncake's failed")
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
