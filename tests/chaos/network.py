"""Two network namespaces with a bad wire between them, and a good one from each to the test.

The kernel's own ``netem`` is not needed: the wire is a pair of TUN devices, and a thread of the test carries the packets
from one to the other, late, some not at all, and no faster than it should.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import secrets
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_QUEUE_PACKETS = 256
_PACKET_BYTES = 2048


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = f"{' '.join(command)}: {done.stderr.strip()}"
        raise OSError(message)


@dataclass
class Condition:
    """One-way delay, share of packets lost, and bits per second; each direction has its own line."""

    delay_s: float = 0.0
    loss: float = 0.0
    bits_per_s: float = float("inf")


class Wire:
    """Carries packets between two TUN devices, in order, under a condition that may change at any time."""

    def __init__(self, ends: tuple[int, int]) -> None:
        self.condition = Condition()
        self.carried = [0, 0]
        self.lost = 0
        self._ends = ends
        self._free_s = [0.0, 0.0]
        self._queued = [0, 0]
        self._due: list[tuple[float, int, int, bytes]] = []
        self._numbers = itertools.count()
        self._drawn = random.Random(0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wire", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
        for end in self._ends:
            os.close(end)

    def _run(self) -> None:
        while not self._stop.is_set():
            now_s = time.monotonic()
            wait_s = min(0.05, max(0.0, self._due[0][0] - now_s)) if self._due else 0.05
            for end in select.select(self._ends, [], [], wait_s)[0]:
                with contextlib.suppress(BlockingIOError):
                    self._take(self._ends.index(end), os.read(end, _PACKET_BYTES))
            self._deliver()

    def _take(self, side: int, packet: bytes) -> None:
        condition, now_s = self.condition, time.monotonic()
        if self._drawn.random() < condition.loss or self._queued[side] >= _QUEUE_PACKETS:
            self.lost += 1
            return
        self._free_s[side] = max(now_s, self._free_s[side]) + len(packet) * 8 / condition.bits_per_s
        self._queued[side] += 1
        heapq.heappush(self._due, (self._free_s[side] + condition.delay_s, next(self._numbers), side, packet))

    def _deliver(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            _, _, side, packet = heapq.heappop(self._due)
            self._queued[side] -= 1
            with contextlib.suppress(OSError):
                os.write(self._ends[1 - side], packet)
                self.carried[side] += len(packet)


@dataclass
class Namespaces:
    """``hosts`` are the addresses of the two namespaces, ``gateway`` is where the test itself can be reached."""

    names: tuple[str, str]
    hosts: tuple[str, str]
    gateway: str
    wire: Wire

    def prefix(self, side: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.names[side])


def _tun(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return end


@contextlib.contextmanager
def namespaces() -> Iterator[Namespaces]:
    """Make them; skips, saying why, where this machine lacks root, namespaces or TUN devices."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces take root")
    if not Path("/dev/net/tun").exists():
        pytest.skip("this kernel has no TUN devices")
    tag = secrets.token_hex(2)
    names = (f"ps{tag}a", f"ps{tag}b")
    nets = tuple(f"10.199.{number}" for number in random.Random(tag).sample(range(1, 250), 2))
    hosts = (f"{nets[0]}.2", f"{nets[1]}.2")
    gateway = f"{nets[0]}.1"
    ends: list[int] = []
    with contextlib.ExitStack() as stack:
        try:
            for side, name in enumerate(names):
                run("ip", "netns", "add", name)
                stack.callback(run, "ip", "netns", "del", name)
                ends.append(_tun(f"wire{tag}{side}"))
                _connect(name, side, tag, nets[side], hosts)
        except OSError as error:
            for end in ends:
                os.close(end)
            pytest.skip(f"network namespaces cannot be made here: {error}")
        run("ip", "-n", names[1], "route", "add", f"{gateway}/32", "via", f"{nets[1]}.1")
        wire = Wire((ends[0], ends[1]))
        stack.callback(wire.close)
        yield Namespaces(names, hosts, gateway, wire)


def _connect(name: str, side: int, tag: str, net: str, hosts: tuple[str, str]) -> None:
    """A good line to the test, and one end of the wire towards the other namespace alone."""
    near, device = f"ps{tag}v{side}", f"wire{tag}{side}"
    run("ip", "link", "add", near, "type", "veth", "peer", "name", "good", "netns", name)
    run("ip", "addr", "add", f"{net}.1/30", "dev", near)
    run("ip", "link", "set", near, "up")
    run("ip", "link", "set", device, "netns", name)
    for command in (
        ("link", "set", "lo", "up"),
        ("addr", "add", f"{hosts[side]}/30", "dev", "good"),
        ("link", "set", "good", "up"),
        ("addr", "add", f"{hosts[side]}/32", "dev", device),
        ("link", "set", device, "mtu", "1400", "up"),
        ("route", "add", f"{hosts[1 - side]}/32", "dev", device, "src", hosts[side]),
    ):
        run("ip", "-n", name, *command)
