"""What can happen to a write on its way, put between a sender and its real link."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from prismserve.core.errors import TransportError

Stage = Callable[[], Any]


class FaultyLink:
    """A link whose writes meet a fault."""

    def __init__(self, link: Any, fault: Fault) -> None:
        self._link, self._fault = link, fault
        self.transport = link.transport

    def stage(self, offset_bytes: int, nbytes: int) -> Any:
        return self._fault.stage(self._link, offset_bytes, nbytes)

    def notify(self, notification: bytes) -> Any:
        return self._link.notify(notification)

    def close(self) -> None:
        self._link.close()


class Fault:
    """Lets every write pass but one, the second."""

    victim = 2

    def __init__(self) -> None:
        self.writes = 0
        self.met = False

    def stage(self, link: Any, offset_bytes: int, nbytes: int) -> Any:
        if self.met or self.writes + 1 < self.victim:
            staged = link.stage(offset_bytes, nbytes)
            self.writes += 1
            return staged
        return self.harm(link, offset_bytes, nbytes)

    def harm(self, link: Any, offset_bytes: int, nbytes: int) -> Any:
        raise NotImplementedError


class Flip(Fault):
    """One bit changes after the checksum was taken."""

    def harm(self, link: Any, offset_bytes: int, nbytes: int) -> Any:
        staged = link.stage(offset_bytes, nbytes)
        self.met = True

        def change(buffer: torch.Tensor) -> None:
            buffer[nbytes // 2] ^= 8

        return Changed(staged, change)


class Torn(Fault):
    """The second half of a write does not arrive."""

    def harm(self, link: Any, offset_bytes: int, nbytes: int) -> Any:
        staged = link.stage(offset_bytes, nbytes)
        self.met = True

        def change(buffer: torch.Tensor) -> None:
            buffer[nbytes // 2 :].fill_(0xA5)

        return Changed(staged, change)


class Lost(Fault):
    """The bytes never arrive; whether the notification does is a choice."""

    def __init__(self, *, told: bool) -> None:
        super().__init__()
        self.told = told

    def harm(self, link: Any, offset_bytes: int, nbytes: int) -> Any:
        self.met = True
        return Dropped(link, nbytes, told=self.told)


class Hiccup(Fault):
    """The link raises, once."""

    def harm(self, link: Any, offset_bytes: int, nbytes: int) -> Any:
        self.met = True
        raise TransportError("the wire hiccuped")


class Late(Fault):
    """A write stays under way; it is carried out after the sender has given it up, when its pages may be others'."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way = threading.Event()
        self.cancelled = threading.Event()
        self.write: Callable[[], None] = lambda: None

    def harm(self, link: Any, offset_bytes: int, nbytes: int) -> Any:
        self.met = True
        return Delayed(self, link, offset_bytes, nbytes)


class Changed:
    """A write whose bytes change just before they leave."""

    def __init__(self, staged: Any, change: Callable[[torch.Tensor], None]) -> None:
        self._staged, self._change = staged, change
        self.buffer = staged.buffer

    def submit(self, notification: bytes) -> Any:
        self._change(self.buffer)
        return self._staged.submit(notification)

    def discard(self) -> None:
        self._staged.discard()


class Done:
    def poll(self) -> bool:
        return True

    def cancel(self) -> None:
        pass


class Dropped:
    """Memory that leads nowhere."""

    def __init__(self, link: Any, nbytes: int, *, told: bool) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8)
        self._link, self._told = link, told

    def submit(self, notification: bytes) -> Any:
        return self._link.notify(notification) if self._told else Done()

    def discard(self) -> None:
        pass


class Delayed:
    """Never finishes while it is waited for."""

    def __init__(self, fault: Late, link: Any, offset_bytes: int, nbytes: int) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8)
        self._fault, self._link, self._place = fault, link, (offset_bytes, nbytes)

    def submit(self, notification: bytes) -> Any:
        def write() -> None:
            staged = self._link.stage(*self._place)
            staged.buffer.copy_(self.buffer)
            handle = staged.submit(notification)
            while not handle.poll():
                pass

        self._fault.write = write
        self._fault.under_way.set()
        return self

    def poll(self) -> bool:
        return False

    def cancel(self) -> None:
        self._fault.cancelled.set()

    def discard(self) -> None:
        pass
