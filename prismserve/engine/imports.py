"""KV that comes from or goes to other workers: tickets for imports, views for exports, pins for pulls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from prismserve.core.errors import EngineError, OutOfBlocksError, OverloadedError
from prismserve.engine.sequence import State

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Items

    import torch

    from prismserve.core.types import BlockKey
    from prismserve.engine.blocks import BlockManager
    from prismserve.engine.pruning import Pruning
    from prismserve.engine.sequence import Sequence


class LayerSink(Protocol):
    """Takes a prefill's KV as it is made."""

    def layer_ready(self, layer: int, start_token: int, tokens: int) -> None:
        """This layer's KV of these cache slots is final; called in the engine thread, must return at once.

        A PrismServeError raised here ends this request alone.
        """
        ...


@dataclass(frozen=True, slots=True)
class ExportView:
    """A prefill's blocks, valid until ``release_export`` or ``cancel``.

    Attributes:
        table: groups, for ``KVPool.read``; of a ragged sequence, only those it shares.
        prompt_tokens: cache slots to be sent in all, resumed tokens included.
        cached_tokens: leading slots that hold KV already; the sink hears nothing of them.
        layer_tokens: cache length per layer after prefill; at most so many until a prefill method has chosen.
        next_position: position of the first generated token.
        layer_tables: single-layer blocks of each layer of a ragged sequence, for ``KVPool.read_blocks``.
    """

    request_id: str
    attempt: int
    table: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    layer_tokens: tuple[int, ...]
    next_position: int
    layer_tables: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def of(cls, sequence: Sequence, layers: int, prompt_tokens: int) -> ExportView:
        """The view of a sequence, uniform or ragged, as it is now."""
        ragged, pruning = sequence.ragged, sequence.pruning
        layer_tokens = (prompt_tokens,) * layers if ragged is None else sequence.layer_tokens(layers)
        if pruning is not None and sequence.cached < pruning.prompt_tokens:
            layer_tokens = tuple(tokens + prompt_tokens - pruning.prompt_tokens for tokens in pruning.room)
        return cls(
            request_id=sequence.request.request_id,
            attempt=sequence.request.attempt,
            table=tuple(sequence.table),
            prompt_tokens=prompt_tokens,
            cached_tokens=sequence.cached,
            layer_tokens=layer_tokens,
            next_position=sequence.next_position,
            layer_tables=None if ragged is None else tuple(tuple(table.blocks) for table in ragged),
        )


@dataclass(frozen=True, slots=True)
class ImportTicket:
    """Blocks that wait for KV from outside.

    Attributes:
        table: groups, for ``KVPool.write``; empty where each layer has a table.
        cached_tokens: leading slots that are held already and must not be written.
        prompt_tokens: slots that must hold KV when the import is finished.
        generations: tags of ``table``; a write with them is refused once the ticket has ended.
        ticket_id: unique in the engine.
        layer_tables: single-layer blocks of each layer, for a prompt under a prefill method.
        layer_tags: tags of their blocks.
        room_tokens: slots there is room for, over all layers.
    """

    request_id: str
    attempt: int
    table: tuple[int, ...]
    cached_tokens: int
    prompt_tokens: int
    generations: tuple[int, ...]
    ticket_id: int
    layer_tables: tuple[tuple[int, ...], ...] | None = None
    layer_tags: tuple[tuple[int, ...], ...] = ()
    room_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PinnedBlocks:
    """Cached blocks held for a reader.

    Attributes:
        table: groups, for ``KVPool.read``.
        tokens: slots they hold.
        pin_id: for ``unpin``.
    """

    table: tuple[int, ...]
    tokens: int
    pin_id: int


@dataclass(frozen=True, slots=True)
class _Open:
    ticket: ImportTicket
    sequence: Sequence
    adoption: bool


class ImportDesk:
    """Open tickets and pins."""

    def __init__(self, blocks: BlockManager) -> None:
        """Allocate from ``blocks``."""
        self._blocks = blocks
        self._open: dict[int, _Open] = {}
        self._pins: dict[int, tuple[int, ...]] = {}
        # Tickets that a thread writes into, and whether they are to be aborted when it has stopped.
        self._written: dict[int, bool] = {}
        self._next_id = 1

    @property
    def open(self) -> int:
        """Imports begun and not ended (adoptions are not counted)."""
        return sum(not entry.adoption for entry in self._open.values())

    def begin(self, sequence: Sequence, blocks: int, reserve: int) -> ImportTicket:
        """Reserve blocks for a whole prompt; ``reserve`` blocks must remain for running sequences."""
        sequence.state = State.IMPORTING
        if sequence.pruning is not None:
            return self._reserve_layers(sequence, sequence.pruning, reserve)
        return self._reserve(sequence, blocks, sequence.length, reserve, adoption=False)

    def begin_adoption(self, sequence: Sequence, blocks: int, reserve: int) -> ImportTicket:
        """Reserve the first full blocks of a prompt, at most as many as it has."""
        count = min(blocks, len(sequence.keys))
        return self._reserve(sequence, count, count * self._blocks.pool.block_tokens, reserve, adoption=True)

    def peek(self, ticket: ImportTicket) -> Sequence:
        """The sequence of an open ticket; EngineError if it has ended."""
        entry = self._open.get(ticket.ticket_id)
        if entry is None:
            message = "the import has ended already"
            raise EngineError(message, request_id=ticket.request_id)
        return entry.sequence

    def finish(self, ticket: ImportTicket, layer_tokens: Items[int] | None = None) -> Sequence:
        """End a ticket whose KV is complete: its full blocks are published, its sequence keeps the table."""
        sequence = self.peek(ticket)
        if ticket.layer_tables is not None and layer_tokens is None:
            message = "an import with a table per layer ends with the slots of each layer"
            raise EngineError(message, request_id=ticket.request_id)
        del self._open[ticket.ticket_id]
        sequence.advance(ticket.prompt_tokens - sequence.cached, layer_tokens)
        self._blocks.trim(sequence)
        self._blocks.publish(sequence, movable=True)
        return sequence

    def finish_adoption(self, ticket: ImportTicket) -> None:
        """End an adoption: the blocks are published and let go."""
        self._blocks.release(self.finish(ticket))

    def abort(self, ticket: ImportTicket) -> Sequence | None:
        """End a ticket without its KV, if it is being written once that has stopped; None if it has ended already."""
        if ticket.ticket_id in self._written:
            self._written[ticket.ticket_id] = True
            return None
        entry = self._open.pop(ticket.ticket_id, None)
        if entry is None:
            return None
        self._blocks.release(entry.sequence)
        return entry.sequence

    def write_begin(self, ticket: ImportTicket) -> list[torch.Tensor] | None:
        """Memory of an adoption's missing blocks, for a thread to write into until :meth:`write_end`; see the storage.

        Whatever happens to the request meanwhile, the blocks are nobody else's.
        """
        self.peek(ticket)
        memory = self._blocks.pool.memory
        held = ticket.cached_tokens // self._blocks.pool.block_tokens
        views = [view for group in ticket.table[held:] if (view := memory.group_view(group)) is not None]
        if len(views) < len(ticket.table) - held:
            return None
        self._written[ticket.ticket_id] = False
        return views

    def write_end(self, ticket: ImportTicket, blocks: int) -> int:
        """The thread has stopped after ``blocks`` good blocks; publish them, unless the request is gone.

        Returns:
            Blocks published.
        """
        if self._written.pop(ticket.ticket_id) or not blocks:
            self.abort(ticket)
            return 0
        tokens = ticket.cached_tokens + blocks * self._blocks.pool.block_tokens
        self.finish_adoption(replace(ticket, prompt_tokens=tokens))
        return blocks

    def abort_sequence(self, sequence: Sequence) -> None:
        """End the ticket of an importing sequence."""
        for entry in list(self._open.values()):
            if entry.sequence is sequence:
                self.abort(entry.ticket)

    def cancel_adoptions(self, request_id: str, attempt: int) -> bool:
        """End a request's adoptions; whether there were any."""
        found = [
            entry.ticket
            for entry in self._open.values()
            if entry.adoption and entry.sequence.identity == (request_id, attempt)
        ]
        for ticket in found:
            self.abort(ticket)
        return bool(found)

    def writer(self, ticket: ImportTicket) -> Callable[[int, int, torch.Tensor, torch.Tensor], None]:
        """A function (layer, start_token, keys, values) that writes into a ticket's blocks, from any thread.

        It raises LeaseExpiredError once the ticket has ended and its blocks were let go.
        """
        pool = self._blocks.pool

        def write(layer: int, start_token: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            if start_token < ticket.cached_tokens:
                message = f"slots below {ticket.cached_tokens} are shared and must not be written"
                raise EngineError(message, request_id=ticket.request_id)
            if ticket.layer_tables is None:
                pool.write(layer, ticket.table, start_token, keys, values, ticket.generations)
                return
            if not 0 <= layer < len(ticket.layer_tables):
                message = f"layer {layer} is outside 0..{len(ticket.layer_tables) - 1}"
                raise EngineError(message, request_id=ticket.request_id)
            pool.write_blocks(ticket.layer_tables[layer], start_token, keys, values, ticket.layer_tags[layer])

        return write

    def pin(self, keys: Items[BlockKey]) -> PinnedBlocks:
        """Hold the longest leading run of ``keys`` that is cached."""
        table = tuple(self._blocks.prefix.held_run(keys))
        self._blocks.pool.retain(table)
        pin_id = self._take_id()
        self._pins[pin_id] = table
        return PinnedBlocks(table, len(table) * self._blocks.pool.block_tokens, pin_id)

    def unpin(self, pin_id: int) -> None:
        """Let go of a pin; nothing happens if it has ended."""
        self._blocks.prefix.release(self._pins.pop(pin_id, ()))

    def held(self) -> list[tuple[int, ...]]:
        """Tables of pins and adoptions, for the integrity check."""
        adoptions = (tuple(entry.sequence.table) for entry in self._open.values() if entry.adoption)
        return [*self._pins.values(), *adoptions]

    def _reserve(self, sequence: Sequence, blocks: int, tokens: int, reserve: int, *, adoption: bool) -> ImportTicket:
        request = sequence.request
        if blocks > self._blocks.pool.groups:
            message = f"the request needs {blocks} KV blocks, the pool has {self._blocks.pool.groups}"
            raise OutOfBlocksError(message, request_id=request.request_id)
        if blocks + reserve > self._blocks.prefix.available() + self._held_in_use(sequence, blocks):
            message = f"{blocks} KV blocks are needed, {self._blocks.prefix.available()} are available"
            raise OverloadedError(message, request_id=request.request_id)
        self._blocks.reserve(sequence, blocks)
        ticket = ImportTicket(
            request_id=request.request_id,
            attempt=request.attempt,
            table=tuple(sequence.table),
            cached_tokens=sequence.cached,
            prompt_tokens=tokens,
            generations=self._blocks.pool.tags(sequence.table),
            ticket_id=self._take_id(),
            room_tokens=tokens * self._blocks.pool.layout.layers,
        )
        self._open[ticket.ticket_id] = _Open(ticket, sequence, adoption)
        return ticket

    def _reserve_layers(self, sequence: Sequence, pruning: Pruning, reserve: int) -> ImportTicket:
        """Reserve blocks by layer for a prompt under a prefill method: nothing of it is found in or left to a cache."""
        pool, prefix = self._blocks.pool, self._blocks.prefix
        extra = sequence.length - pruning.prompt_tokens
        room = [tokens + extra for tokens in pruning.room]
        groups = pool.groups_for_blocks(sum(pool.blocks_for(tokens + 1) for tokens in room))
        if groups + reserve > prefix.available():
            message = f"{groups} KV blocks are needed, {prefix.available()} are available"
            raise OverloadedError(message, request_id=sequence.request.request_id)
        self._blocks.reserve_layers(sequence, [tokens + 1 for tokens in room])
        tables = tuple(tuple(table.blocks) for table in sequence.ragged or ())
        ticket = ImportTicket(
            request_id=sequence.request.request_id,
            attempt=sequence.request.attempt,
            table=(),
            cached_tokens=0,
            prompt_tokens=sequence.length,
            generations=(),
            ticket_id=self._take_id(),
            layer_tables=tables,
            layer_tags=tuple(tuple(pool.slab.tag(block) for block in table) for table in tables),
            room_tokens=sum(room),
        )
        self._open[ticket.ticket_id] = _Open(ticket, sequence, adoption=False)
        return ticket

    def _held_in_use(self, sequence: Sequence, blocks: int) -> int:
        """Matched blocks that cost nothing because someone references them anyway."""
        references = self._blocks.pool.references
        return sum(references[group] > 0 for group in self._blocks.prefix.held_run(sequence.keys[:blocks]))

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id
