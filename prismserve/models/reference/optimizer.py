"""Muon for the matrices inside the blocks, AdamW for embeddings, norms, biases and heads; rates and steps of any stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from prismserve.models.reference.heads import Heads


def set_rate(groups: Iterable[dict[str, Any]], step: int, progress: float, warmup_steps: int) -> None:
    """Linear warm-up, then cosine to 2 % of each group's ``base`` as ``progress`` goes from 0 to 1."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    factor = min(1.0, (step + 1) / warmup_steps) * cosine
    for group in groups:
        group["lr"] = group["base"] * factor


def descend(loss: torch.Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """One step down the gradient of ``loss``, clipped to norm 1 over all parameters together."""
    for part in optimizers:
        part.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    parameters = [p for part in optimizers for group in part.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for part in optimizers:
        part.step()


class Optimizers:
    """Two optimizers over several modules, each module with its own peak rate.

    Args:
        groups: (module, peak learning rate); AdamW runs at half the rate.
    """

    def __init__(self, *groups: tuple[torch.nn.Module, float]) -> None:
        muon, adam = [], []
        for module, rate in groups:
            matrices = [
                p
                for name, p in module.named_parameters()
                if p.ndim == 2 and "embed" not in name and not isinstance(module, Heads)
            ]
            inside = {id(p) for p in matrices}
            rest = [p for p in module.parameters() if id(p) not in inside]
            if matrices:
                muon.append({"params": matrices, "lr": rate, "base": rate})
            adam.append({"params": rest, "lr": rate / 2, "base": rate / 2})
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
            torch.optim.Muon(muon, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        ]
        self._groups = [group for part in self._parts for group in part.param_groups]

    def set_rate(self, step: int, progress: float, warmup_steps: int) -> None:
        """Linear warm-up, then cosine to 2 % of the peak as ``progress`` goes from 0 to 1."""
        set_rate(self._groups, step, progress, warmup_steps)

    def update(self, loss: torch.Tensor) -> None:
        """One step down the gradient of ``loss``, clipped to norm 1."""
        descend(loss, self._parts)
