"""A mixture of experts in place of an MLP: every token goes through its chosen experts, none is dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from prismserve.kernels.silu_mul import silu_mul

if TYPE_CHECKING:
    from prismserve.models.config import DecoderConfig, ExpertsConfig


class Experts(nn.Module):
    """Router, experts and, where the family has one, the expert that every token goes through.

    Tokens are sorted by expert, so that each expert multiplies one contiguous group whatever its size.
    """

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = experts
        hidden, inner, shared = config.hidden_size, experts.intermediate_size, experts.shared_intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        self.router = parameter(experts.count, hidden)
        self.gate_up = parameter(experts.count, 2 * inner, hidden)
        self.down = parameter(experts.count, hidden, inner)
        self.shared_gate = parameter(1, hidden) if shared else None
        self.shared_gate_up = parameter(2 * shared, hidden) if shared else None
        self.shared_down = parameter(hidden, shared) if shared else None

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, D] to the weights [T, k] in the dtype of ``x`` and the indices [T, k] of each token's experts."""
        scores = functional.linear(x, self.router).softmax(dim=-1, dtype=torch.float32)
        weights, chosen = scores.topk(self.config.per_token, dim=-1)
        if self.config.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(x.dtype), chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] to [T, D]."""
        weights, chosen = self.route(x)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        grouped = x[order // self.config.per_token]
        results = torch.empty_like(grouped)
        start = 0
        for expert, tokens in enumerate(flat.bincount(minlength=self.config.count).tolist()):
            if tokens:
                rows = slice(start, start + tokens)
                gated = silu_mul(functional.linear(grouped[rows], self.gate_up[expert]))
                results[rows] = functional.linear(gated, self.down[expert])
                start += tokens
        # Put back rather than added up in place: the order of the sum is then each token's own, whatever the batch.
        placed = torch.empty_like(results)
        placed[order] = results
        out = (placed.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
        if self.shared_gate is None or self.shared_gate_up is None or self.shared_down is None:
            return out
        shared = functional.linear(silu_mul(functional.linear(x, self.shared_gate_up)), self.shared_down)
        return out + functional.linear(x, self.shared_gate).sigmoid() * shared

    def weight_targets(self) -> dict[str, torch.Tensor]:
        """Views of the parameters under the names a Hugging Face checkpoint gives their parts."""
        block, inner = self.config.block, self.config.intermediate_size
        gate, up, down = self.config.parts
        targets = {f"{block}.gate.weight": self.router.data}
        for expert in range(self.config.count):
            prefix = f"{block}.experts.{expert}"
            targets[f"{prefix}.{gate}.weight"] = self.gate_up[expert, :inner]
            targets[f"{prefix}.{up}.weight"] = self.gate_up[expert, inner:]
            targets[f"{prefix}.{down}.weight"] = self.down[expert]
        if self.shared_gate is not None and self.shared_gate_up is not None and self.shared_down is not None:
            shared = self.config.shared_intermediate_size
            targets[f"{block}.shared_expert_gate.weight"] = self.shared_gate
            targets[f"{block}.shared_expert.gate_proj.weight"] = self.shared_gate_up[:shared]
            targets[f"{block}.shared_expert.up_proj.weight"] = self.shared_gate_up[shared:]
            targets[f"{block}.shared_expert.down_proj.weight"] = self.shared_down
        return targets
