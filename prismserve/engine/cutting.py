"""Carries out cuts: rows of a batch that wait below the entry layer, return for the whole prompt, and become fewer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prismserve.compression.cuts import RATERS_MAX, ChoosesRaters, CutInputs, CutNeed, CutPlan, Raters, Tap, salience
from prismserve.core.errors import EngineError
from prismserve.engine.salience import LayerView, blended_rows, query_sums, rope_scores, row_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.compression.cuts import Cut, Grid
    from prismserve.engine.pool import KVPool
    from prismserve.engine.pruning import Pruning
    from prismserve.engine.sequence import Sequence as EngineSequence
    from prismserve.models.decoder import AttentionBackend, Decoder, Rotary


class Stage:
    """One sequence's part in one step, while its prompt is computed below the entry layer or through its cuts.

    Attributes:
        counts: rows in each layer, filled in as the layers run.
    """

    def __init__(self, sequence: EngineSequence, tokens: int, layers: int) -> None:
        """Compute ``tokens`` slots from ``sequence.cached`` on."""
        if sequence.pruning is None:
            message = "a sequence without cuts has no stages"
            raise EngineError(message, request_id=sequence.request.request_id)
        self.sequence = sequence
        self.pruning: Pruning = sequence.pruning
        self.tokens = tokens
        self.final = sequence.cached + tokens == self.pruning.prompt_tokens
        self.counts = [0] * layers
        self._positions = sequence.positions
        self._next_cut = 0
        self._rows = self._visual = self._medium = self._places = torch.empty(0, dtype=torch.int64)
        self._sizes = torch.empty(0)
        self._measured: dict[str, torch.Tensor | None] = {}

    # ---- before a layer ----------------------------------------------------------------------------------------

    def before(self, layer: int, x: torch.Tensor, decoder: Decoder, pool: KVPool) -> torch.Tensor | None:
        """What of this sequence enters a layer: [R, D], or None where the rows are those that left the one before.

        Args:
            layer: decoder layer about to run.
            x: [R', D] this sequence's rows of the batch.
            decoder: for the queries and keys a cut may want beforehand.
            pool: holds the keys of the base.
        """
        pruning = self.pruning
        changed: torch.Tensor | None = None
        if layer == pruning.entry:
            changed = self._enter(x)
        cuts = pruning.cuts
        if self.final and self._next_cut < len(cuts) and cuts[self._next_cut].layer == layer:
            changed = self._cut(x if changed is None else changed, decoder, pool)
        self.counts[layer] = x.shape[0] if changed is None else changed.shape[0]
        return changed

    def positions(self, layer: int) -> torch.Tensor:
        """Positions of the rows that enter a layer, [R] or [3, R]."""
        if self._positions is None:
            message = "the inputs of a sequence were not prepared"
            raise EngineError(message, request_id=self.sequence.request.request_id)
        if layer < self.pruning.entry:
            first = self.sequence.cached
            return self._positions[..., first : first + self.tokens]
        return self._positions[..., self._rows.cpu() + self.pruning.base]

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        """Hold a chunk, or put the whole rest of the prompt together."""
        pruning = self.pruning
        if not self.final:
            pruning.held.append(x.clone())
            return x[:0]
        whole = torch.cat((*pruning.held, x)) if pruning.held else x
        pruning.held.clear()
        device = x.device
        spans, base = self.sequence.spans, pruning.base
        self._rows = torch.arange(whole.shape[0], device=device)
        visual: list[torch.Tensor] = []
        places: list[torch.Tensor] = []
        for span, grid, raster in zip(spans, pruning.grids, pruning.rasters, strict=True):
            rows = torch.arange(span.start - base, span.end - base)
            slots = self.sequence.images[span.segment.key].positions
            if raster is not None:
                inside = torch.isin(slots, raster)
                rows, slots = rows[inside], torch.searchsorted(raster, slots[inside])
            visual.append(rows)
            places.append(_places(slots, grid))
        self._visual = torch.cat(visual).to(device)
        self._medium = torch.repeat_interleave(
            torch.arange(len(spans), device=device), torch.tensor(pruning.counts, device=device)
        )
        self._places = torch.cat(places).to(device)
        self._sizes = torch.ones(len(self._visual), device=device)
        return whole

    # ---- within a layer ----------------------------------------------------------------------------------------

    def tapped(self, layer: int) -> Cut | None:
        """The cut behind this layer that looks at its attention, if there is one."""
        cuts = self.pruning.cuts
        if not self.final or self._next_cut >= len(cuts):
            return None
        cut = cuts[self._next_cut]
        return cut if cut.tap is Tap.BEFORE and cut.layer == layer + 1 else None

    def look(self, cut: Cut, view: LayerView, values: torch.Tensor, decoder: Decoder) -> torch.Tensor | None:
        """Take what a cut wants of a layer's attention; [N, H, d] outputs of the visual rows where it blends them."""
        self._measured = self._measure(cut, view, decoder)
        if not cut.blend:
            return None
        sums = self._measured["query_sums"]
        sums = query_sums(view, self._visual) if sums is None else sums
        return blended_rows(view, values, self._visual, cut.blend * salience(sums))

    @property
    def visual_rows(self) -> torch.Tensor:
        """[N] which of this sequence's rows are visual."""
        return self._visual

    def base_kv(self, layer: int, pool: KVPool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the base in one layer."""
        table = (self.sequence.ragged or [])[layer]
        return pool.read_blocks(table.blocks, 0, self.pruning.base)

    # ---- a cut -------------------------------------------------------------------------------------------------

    def _cut(self, x: torch.Tensor, decoder: Decoder, pool: KVPool) -> torch.Tensor:
        pruning, number = self.pruning, self._next_cut
        cut = pruning.cuts[number]
        plan = pruning.plans.get(number)
        if plan is None:
            if cut.tap is Tap.AFTER:
                rotary = decoder.rotary(self.positions(cut.layer).to(x.device))
                q, k, _ = decoder.project(cut.layer, x, rotary)
                base, _ = self.base_kv(cut.layer, pool)
                view = LayerView(q, torch.cat((base.to(k), k)), pruning.base, pool.layout.head_dim**-0.5)
                self._measured = self._measure(cut, view, decoder)
            hidden = x[self._visual] if CutNeed.HIDDEN in cut.needs else None
            with torch.no_grad():
                plan = pruning.method.plan(number, self._inputs(hidden), pruning.config)
            check_plan(plan, len(self._visual))
            pruning.plans[number] = plan
        self._measured = {}
        self._next_cut += 1
        return self._apply(plan, x)

    def _inputs(self, hidden: torch.Tensor | None) -> CutInputs:
        pruning = self.pruning
        return CutInputs(
            layers=len(self.counts),
            cut_layers=tuple(cut.layer for cut in pruning.cuts[: self._next_cut + 1]),
            history=(sum(pruning.counts), *pruning.kept),
            grids=pruning.grids,
            medium=self._medium,
            places=self._places,
            sizes=self._sizes,
            seed=pruning.seed,
            hidden=hidden,
            **self._measured,
        )

    def _measure(self, cut: Cut, view: LayerView, decoder: Decoder) -> dict[str, torch.Tensor | None]:
        measured: dict[str, torch.Tensor | None] = dict.fromkeys(("scores", "rope_scores", "keys", "query_sums"))
        if self._next_cut in self.pruning.plans:
            return measured
        if cut.raters is not Raters.NONE:
            rows = self._raters(cut.raters, decoder)
            measured["scores"] = row_scores(view, rows, self._visual)
            if CutNeed.ROPE_SCORES in cut.needs:
                before = torch.arange(view.base)
                places = torch.cat((before, self._rows.cpu() + view.base))
                assert self._positions is not None  # noqa: S101 - ``positions`` has looked
                rotary = decoder.rotary(self._positions[..., places].to(view.q.device))
                measured["rope_scores"] = rope_scores(rotary, view.base, rows, self._visual, view.scale)
        if CutNeed.KEYS in cut.needs:
            measured["keys"] = view.keys[self._visual + view.base]
        if CutNeed.QUERY_SUMS in cut.needs:
            measured["query_sums"] = query_sums(view, self._visual)
        return measured

    def _raters(self, which: Raters, decoder: Decoder) -> torch.Tensor:
        """[r] rows of this sequence that score; the last one where no text follows the last image."""
        rows, spans = self._rows, self.sequence.spans
        question = torch.arange(self._question_start(), rows.shape[0], device=rows.device)
        if which is Raters.LAST or len(question) == 0:
            return torch.tensor([rows.shape[0] - 1], device=rows.device)
        if which is Raters.QUESTION:
            return question[-RATERS_MAX:]
        method, ids = self.pruning.method, self.sequence.ids
        if not isinstance(method, ChoosesRaters) or ids is None:
            message = f"prefill method {method.name!r} does not choose its raters"
            raise EngineError(message, request_id=self.sequence.request.request_id)
        width = decoder.config.hidden_size
        text = decoder.embed(ids[spans[-1].end : self.pruning.prompt_tokens].to(rows.device))
        visual = torch.cat([self.sequence.images[span.segment.key].embeds[:, :width] for span in spans])
        return question[method.raters(visual.to(text), text, self.pruning.config)]

    def _question_start(self) -> int:
        """First row behind the last image; all rows from there on are text, and none of them ever leaves."""
        return int(self._rows.shape[0]) - (self.pruning.prompt_tokens - self.sequence.spans[-1].end)

    def _apply(self, plan: CutPlan, x: torch.Tensor) -> torch.Tensor:
        """Fold and drop visual rows; text rows stay as they are."""
        indices = plan.indices.to(x.device)
        if plan.targets is not None and plan.weights is not None:
            x = self._fold(plan, indices, x)
            joined = plan.targets >= 0
            sizes = torch.zeros(len(indices), device=x.device)
            self._sizes = sizes.index_add(0, plan.targets[joined], self._sizes[joined])
        else:
            self._sizes = self._sizes[indices]
        staying = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        staying[self._visual] = False
        kept = self._visual[indices]
        staying[kept] = True
        self._visual = staying.cumsum(0)[kept] - 1
        self._rows, self._medium, self._places = self._rows[staying], self._medium[indices], self._places[indices]
        self.pruning.kept.append(len(indices))
        return x[staying]

    def _fold(self, plan: CutPlan, indices: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Rows whose survivors are the weighted sums of what was folded into them; the others stay bit-equal."""
        assert plan.targets is not None  # noqa: S101 - the caller has looked
        assert plan.weights is not None  # noqa: S101
        joined = plan.targets >= 0
        targets, weights = plan.targets[joined], plan.weights[joined]
        wide = x[self._visual[joined]].float() * weights[:, None]
        sums = torch.zeros((len(indices), x.shape[1]), device=x.device).index_add(0, targets, wide)
        alone = (torch.bincount(targets, minlength=len(indices)) == 1) & (plan.weights[indices] == 1)
        survivors = self._visual[indices]
        x = x.clone()
        x[survivors] = torch.where(alone[:, None], x[survivors], sums.to(x.dtype))
        return x


def check_plan(plan: CutPlan, tokens: int) -> None:
    """EngineError unless a plan's indices ascend within ``tokens`` and its targets name survivors."""
    indices, targets, weights = plan.indices, plan.targets, plan.weights
    fits = indices.dtype is torch.int64 and bool((indices.diff() > 0).all())
    fits = fits and (len(indices) == 0 or (int(indices[0]) >= 0 and int(indices[-1]) < tokens))
    if fits and targets is not None:
        fits = weights is not None and len(targets) == len(weights) == tokens
        fits = fits and (tokens == 0 or int(targets.max()) < len(indices))
    if not fits:
        message = f"a prefill method chose survivors that do not fit {tokens} visual tokens"
        raise EngineError(message)


def _places(positions: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[k] raster places of an image's tokens, from their positions within it: [k], or [3, k] time, row and column."""
    if positions.shape[-1] == grid.tokens:
        return torch.arange(grid.tokens)
    if positions.dim() == 1:
        return positions
    times = torch.tensor(sorted(set(positions[0].tolist())))
    frames = torch.searchsorted(times, positions[0].contiguous())
    return (frames * grid.rows + positions[1]) * grid.columns + positions[2]


class CuttingAttention:
    """An attention backend that shows the layers before cuts to the stages that want to see them."""

    def __init__(self, inner: AttentionBackend, stages: Sequence[Stage], decoder: Decoder, pool: KVPool) -> None:
        """Wrap ``inner``; the rows of ``stages`` are the last ones of the batch, in this order."""
        self._inner = inner
        self._stages = stages
        self._decoder = decoder
        self._pool = pool

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As the wrapped backend does, but for visual rows that a cut blends."""
        out = self._inner.attend(layer, q, k, v)
        first = q.shape[0] - sum(stage.counts[layer] for stage in self._stages)
        for stage in self._stages:
            rows = slice(first, first + stage.counts[layer])
            first = rows.stop
            cut = stage.tapped(layer)
            if cut is None:
                continue
            keys, values = stage.base_kv(layer, self._pool)
            view = LayerView(q[rows], torch.cat((keys.to(k), k[rows])), keys.shape[0], self._pool.layout.head_dim**-0.5)
            blended = stage.look(cut, view, torch.cat((values.to(v), v[rows])), self._decoder)
            if blended is not None:
                out = out.clone()
                out[rows.start + stage.visual_rows] = blended
        return out


def enter_layer(
    layer: int, x: torch.Tensor, positions: torch.Tensor, stages: Sequence[Stage], decoder: Decoder, pool: KVPool
) -> tuple[torch.Tensor, torch.Tensor, Rotary | None]:
    """The batch as it enters a layer.

    Args:
        layer: about to run.
        x: [T, D] what left the layer before.
        positions: [T] or [3, T] of these rows.
        stages: whose rows come last in the batch, in this order.
        decoder: the decoder.
        pool: the KV pool.

    Returns:
        Rows and positions, and the angles where rows have changed; None where they are the same.
    """
    first = before = x.shape[0] - sum(_rows_left(stage, layer) for stage in stages)
    pieces: list[torch.Tensor] = [x[:first]]
    changed = False
    for stage in stages:
        rows = x[first : first + _rows_left(stage, layer)]
        first += rows.shape[0]
        fresh = stage.before(layer, rows, decoder, pool)
        changed = changed or fresh is not None
        pieces.append(rows if fresh is None else fresh)
    if not changed:
        return x, positions, None
    places = [stage.positions(layer).to(positions.device) for stage in stages]
    positions = join_positions([positions[..., :before], *places])
    return torch.cat(pieces), positions, decoder.rotary(positions)


def _rows_left(stage: Stage, layer: int) -> int:
    """Rows of a stage that left the layer before."""
    return stage.counts[layer - 1] if layer else stage.tokens


def join_positions(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Positions [T] of all parts, or [3, T] if some have three components; those with one repeat it."""
    if any(part.dim() > 1 for part in parts):
        parts = [part if part.dim() > 1 else part.expand(3, -1) for part in parts]
    return torch.cat(list(parts), dim=-1)
