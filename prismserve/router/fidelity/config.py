"""How much is replayed, when, and what a preset may cost before it steps back."""

from __future__ import annotations

from pydantic import Field

from prismserve.core.config import FrozenConfig, NonNegativeInt, PositiveInt, PositiveSeconds


class FidelityConfig(FrozenConfig):
    """The fidelity guard of every router."""

    share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of compressed requests that are replayed without compression when workers are idle; 0 turns "
        "the guard off (ratio).",
    )
    step_back: bool = Field(
        default=True,
        description="Whether a preset that passes its bound is replaced by the next milder one until it is good again.",
    )
    quality_disagreement_max: float = Field(
        default=0.05,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Share of answers under `quality` that may differ from those without compression (ratio).",
    )
    balanced_disagreement_max: float = Field(
        default=0.10, gt=0, le=1, allow_inf_nan=False, description="The same under `balanced` (ratio)."
    )
    turbo_disagreement_max: float = Field(
        default=0.25, gt=0, le=1, allow_inf_nan=False, description="The same under `turbo` (ratio)."
    )
    kl_max_nats: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Mean divergence of next-token distributions above which any preset steps back; unset: it is only "
        "exported (nats).",
    )
    samples_min: PositiveInt = Field(default=20, description="Comparisons before a preset is judged (count).")
    window: PositiveInt = Field(default=200, description="Latest comparisons a preset is judged by (count).")
    recover_after_s: PositiveSeconds = Field(
        default=900.0, description="A preset that stepped back stays back at least so long (seconds)."
    )
    recover_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Part of its bound that replays of a preset must stay below for it to come back (ratio).",
    )
    replay_tokens: PositiveInt = Field(
        default=32, description="Leading tokens of an answer that are compared (tokens)."
    )
    replay_timeout_s: PositiveSeconds = Field(default=30.0, description="One generation of a replay (seconds).")
    queue_requests: NonNegativeInt = Field(default=16, description="Requests waiting to be replayed (count).")
    queue_bytes: NonNegativeInt = Field(default=64 << 20, description="Images and videos they hold (bytes).")
    queue_age_s: PositiveSeconds = Field(
        default=120.0, description="A request that found no idle moment for so long is not replayed (seconds)."
    )
    idle_check_s: PositiveSeconds = Field(
        default=0.2, description="Between two looks whether workers are idle (seconds)."
    )
    label_sets_max: PositiveInt = Field(
        default=128, description="Combinations of tenant, method and preset told apart in metrics (count)."
    )
