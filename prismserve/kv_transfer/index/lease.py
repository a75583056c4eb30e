"""Keeps one worker registered and its keys announced, through every loss of the index.

The owner says what its cache gained and lost; a task sends it, renews the lease, and after any loss or failure
registers again and announces everything. While the index is away only the net change is kept, so memory stays
bounded by the owner's own cache.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from prismserve.core.errors import ConfigurationError, IndexUnavailableError
from prismserve.core.types import Tier, WorkerInfo, WorkerState
from prismserve.kv_transfer.index.base import KVIndex
from prismserve.kv_transfer.index.config import IndexConfig

_LOG = logging.getLogger(__name__)
_CANCEL_AGAIN_S = 0.1


class WorkerLease:
    """One worker's presence in the index. Belongs to one event loop; see ``changed`` for other threads.

    Args:
        index: where to register.
        info: the worker's record; its epoch is set by the registration.
        held_keys: every key the worker holds now, by tier, called on the event loop when all must be announced;
            those that follow each other in a chain should do so here.
        on_epoch: called with each new epoch; an earlier one is fenced from then on.
    """

    def __init__(
        self,
        index: KVIndex,
        info: WorkerInfo,
        held_keys: Callable[[], Mapping[Tier, Sequence[bytes]]],
        config: IndexConfig | None = None,
        on_epoch: Callable[[int], None] | None = None,
    ) -> None:
        self._index = index
        self._info = info
        self._held_keys = held_keys
        self._config = config or IndexConfig()
        self._on_epoch = on_epoch
        self._pending: dict[Tier, dict[bytes, bool]] = {}
        self._announce_all = True
        self._registered = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def info(self) -> WorkerInfo:
        """The record with the current epoch and state."""
        return self._info

    @property
    def registered(self) -> bool:
        """Whether the index knew this worker at the last call."""
        return self._registered

    async def start(self) -> int:
        """Register, begin renewing, and return the epoch.

        Raises:
            IndexUnavailableError: the index cannot be reached.
            ConfigurationError: the record cannot be stored.
        """
        await self._register()
        self._task = asyncio.create_task(self._run(), name=f"index-lease-{self._info.worker_id}")
        return self._info.epoch

    def changed(self, added: Iterable[bytes], removed: Iterable[bytes], tier: Tier = Tier.DEVICE) -> None:
        """Note keys gained and lost in one tier, in this order. On the event loop's thread only."""
        pending = self._pending.setdefault(tier, {})
        pending.update(dict.fromkeys(added, True))
        pending.update(dict.fromkeys(removed, False))
        self._wake.set()

    def set_state(self, state: WorkerState) -> None:
        """Publish a new state with the next renewal, which happens at once."""
        self._info = dataclasses.replace(self._info, state=state)
        self._wake.set()

    async def stop(self) -> None:
        """Stop renewing and leave the index; an unreachable index forgets the worker by its lease."""
        self._stopping = True
        task, self._task = self._task, None
        while task is not None and not task.done():
            # A cancellation that meets a reply in the Redis client can be lost there, so one is not enough.
            task.cancel()
            await asyncio.wait((task,), timeout=_CANCEL_AGAIN_S)
        if self._registered:
            self._registered = False
            try:
                await self._index.deregister(self._info.worker_id, self._info.epoch)
            except IndexUnavailableError as error:
                _LOG.warning("worker %s leaves by its lease: %s", self._info.worker_id, error.message)

    # ------------------------------------------------------------------ private

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        next_beat_s = loop.time()
        state = None
        while not self._stopping:
            try:
                if not self._announce_all:
                    # What has changed does not wait for the answer to a renewal.
                    await self._send()
                if loop.time() >= next_beat_s or state is not self._info.state:
                    next_beat_s = loop.time() + self._config.heartbeat_interval_s
                    state = self._info.state
                    await self._beat()
                await self._send()
            except IndexUnavailableError as error:
                # What a failed announcement left behind is unknown, so nothing less than all of it will do.
                self._announce_all = True
                if self._registered:
                    _LOG.warning("worker %s lost the index: %s", self._info.worker_id, error.message)
                self._registered = False
                await asyncio.sleep(min(1.0, self._config.heartbeat_interval_s))
                next_beat_s = loop.time()
            await self._idle(next_beat_s - loop.time())

    async def _idle(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()

    async def _beat(self) -> None:
        info = self._info
        if await self._index.heartbeat(info.worker_id, info.epoch, info.state):
            self._registered = True
        else:
            await self._register()

    async def _register(self) -> None:
        before = self._info.epoch
        epoch = await self._index.register(self._info)
        self._info = dataclasses.replace(self._info, epoch=epoch)
        self._registered = True
        self._announce_all = True
        if epoch != before:
            if before:
                _LOG.warning("worker %s has epoch %d now, %d is fenced", self._info.worker_id, epoch, before)
            if self._on_epoch is not None:
                self._on_epoch(epoch)

    async def _send(self) -> None:
        """Announce what is pending, or everything after a loss."""
        if self._announce_all:
            self._announce_all = False
            self._pending = {}
            known = await self._announce(Tier.DEVICE, (), (), replace=True)
            for tier, keys in self._held_keys().items():
                known = known and await self._announce(tier, keys, ())
        else:
            known = await self._send_changes()
        if not known:
            await self._register()
            self._wake.set()

    async def _send_changes(self) -> bool:
        pending, self._pending = self._pending, {}
        calls: list[tuple[Tier, Sequence[bytes], Sequence[bytes]]] = [
            (tier, [key for key, held in changes.items() if held], [key for key, held in changes.items() if not held])
            for tier, changes in pending.items()
        ]
        if len(calls) > 1:
            # What every tier gained goes first: a block that moved is then never missing.
            calls = [(tier, added, ()) for tier, added, _ in calls] + [(tier, (), lost) for tier, _, lost in calls]
        for tier, added, removed in calls:
            if (added or removed) and not await self._announce(tier, added, removed):
                return False
        return True

    async def _announce(
        self, tier: Tier, added: Sequence[bytes], removed: Sequence[bytes], *, replace: bool = False
    ) -> bool:
        info = self._info
        try:
            return await self._index.announce(info.worker_id, info.epoch, added, removed, tier=tier, replace=replace)
        except ConfigurationError:
            _LOG.exception("worker %s announced keys that the index refuses", info.worker_id)
            return True
