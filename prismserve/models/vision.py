"""Vision towers of the CLIP, SigLIP and EVA line, from transformers, run only as deep as the projector reads.

What compression asks for beside the features (attention of the class token, keys) comes from the queries and keys of
the layer in question, which is then run step by step; attention stays fused and no [N, N] matrix is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from prismserve.core.errors import ModelLoadError
from prismserve.models.base import NEED_CLASS_TOKEN, NEED_CLS_ATTENTION, NEED_ENCODER_KEYS
from prismserve.models.linear import take_over

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers.configuration_utils import PretrainedConfig

# Vision model types of transformers with this module's structure, and whether they put a class token first.
CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False}
EVA = "instructblip_vision_model"
"""BLIP-2's EVA ViT-g, which LLaMA-VID has too; transformers builds none of its models around it, so only our own tower."""
OWN_TOWERS = {**CLASS_TOKEN, EVA: True}
_TILE_ROWS = 128


@dataclass(frozen=True, slots=True)
class TowerPlan:
    """Which hidden states of the tower are read.

    Attributes:
        depths: per feature layer, after how many encoder layers it is read, in the order they are concatenated.
        class_token: whether row 0 of the hidden states is a class token.
        keep_class_token: whether the projector reads the class token too.
    """

    depths: tuple[int, ...]
    class_token: bool
    keep_class_token: bool

    @property
    def depth(self) -> int:
        """Encoder layers that have to run; the last of them is the one compression asks about."""
        return max(self.depths)

    @classmethod
    def read(
        cls,
        vision: PretrainedConfig,
        feature_layer: int | list[int],
        strategy: str,
        towers: Mapping[str, bool] = CLASS_TOKEN,
    ) -> TowerPlan:
        """Resolve ``vision_feature_layer`` and ``vision_feature_select_strategy`` of a configuration.

        ``towers`` are those the family can build, and whether they have a class token.

        Raises:
            ModelLoadError: unsupported tower, layer out of range, or a strategy the tower cannot follow.
        """
        kind = vision.model_type
        if kind not in towers:
            message = f"vision tower {kind!r} is not supported; supported: {', '.join(sorted(towers))}"
            raise ModelLoadError(message, field="model")
        if strategy not in {"default", "full"}:
            message = f"vision_feature_select_strategy must be 'default' or 'full', got {strategy!r}"
            raise ModelLoadError(message, field="model")
        if strategy == "default" and not towers[kind]:
            message = f"vision_feature_select_strategy 'default' drops a class token, which {kind!r} does not have"
            raise ModelLoadError(message, field="model")
        layers = vision.num_hidden_layers
        wanted = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        depths = tuple(layer if layer >= 0 else layers + 1 + layer for layer in wanted)
        if not depths or max(depths) < 1 or not all(0 <= depth <= layers for depth in depths):
            message = f"vision_feature_layer {feature_layer} does not fit a tower of {layers} layers"
            raise ModelLoadError(message, field="model")
        return cls(depths, towers[kind], keep_class_token=towers[kind] and strategy == "full")


class VisionTower(nn.Module):
    """Embeddings and encoder layers of a transformers vision model, up to the depth of the plan."""

    def __init__(self, vision: PretrainedConfig, plan: TowerPlan, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        # Imported here: processors and routers read configurations without paying for the model code.
        from transformers.initialization import no_init_weights
        from transformers.models.auto.modeling_auto import AutoModel
        from transformers.models.instructblip.modeling_instructblip import InstructBlipVisionModel

        self.plan = plan
        shallow = type(vision).from_dict({**vision.to_dict(), "num_hidden_layers": plan.depth})
        shallow._attn_implementation = "sdpa"  # noqa: SLF001 - transformers has no public setter
        with no_init_weights():
            model: Any = (
                InstructBlipVisionModel(shallow) if vision.model_type == EVA else AutoModel.from_config(shallow)
            )
        self.embeddings: nn.Module = model.embeddings
        self.pre_norm: nn.Module | None = getattr(model, "pre_layrnorm", None)
        self.layers: nn.ModuleList = model.encoder.layers
        # EVA's layers know of no mask, not even that there is none.
        self._unmasked: dict[str, Any] = {} if vision.model_type == EVA else {"attention_mask": None}
        take_over(self)
        self.requires_grad_(requires_grad=False)
        self.to(device=device, dtype=dtype)
        self.eval()

    def forward(
        self, pixels: torch.Tensor, needs: frozenset[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Encode one image.

        Args:
            pixels: [3, height, width] in the tower's dtype.
            needs: of ``cls_attention``, ``encoder_keys`` and ``class_token``.

        Returns:
            Features [N, C] with the feature layers side by side; cls_attention [H, N] float32 or None; keys [N, H, d]
            or None; the class token [C] that is not among the features, or None.
        """
        hidden = self.embeddings(pixels.unsqueeze(0))
        if self.pre_norm is not None:
            hidden = self.pre_norm(hidden)
        states = {0: hidden} if 0 in self.plan.depths else {}
        first = 1 if self.plan.class_token and not self.plan.keep_class_token else 0
        attention = keys = None
        for depth, layer in enumerate(self.layers, start=1):
            if needs - {NEED_CLASS_TOKEN} and depth == self.plan.depth:
                hidden, attention, keys = self._tapped(layer, hidden, needs, first)
            else:
                hidden = layer(hidden, **self._unmasked)
            if depth in self.plan.depths:
                states[depth] = hidden
        features = torch.cat([states[depth][0] for depth in self.plan.depths], dim=-1)
        left_out = features[0] if first and NEED_CLASS_TOKEN in needs else None
        return features[first:], attention, keys, left_out

    def _tapped(
        self, layer: Any, entering: torch.Tensor, needs: frozenset[str], first: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What a layer makes of [1, N(+1), C], with its attention and keys: computed as transformers does, not twice."""
        attention = layer.self_attn
        normed = layer.layer_norm1(entering)
        split = (*normed.shape[:-1], attention.num_heads, -1)
        if hasattr(attention, "qkv"):
            parts, leave = attention.qkv(normed).chunk(3, dim=-1), attention.projection
        else:
            enter = attention.q_proj, attention.k_proj, attention.v_proj
            parts, leave = tuple(projection(normed) for projection in enter), attention.out_proj
        queries, keys, values = (part.view(split).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, scale=attention.scale)
        hidden = entering + leave(mixed.transpose(1, 2).reshape(normed.shape))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        salience = None
        if NEED_CLS_ATTENTION in needs:
            asking = queries[0, :, :1] if self.plan.class_token else queries[0]
            by_head = keys[0].float().transpose(1, 2)
            salience = _mean_received(asking.float() * attention.scale, by_head)[:, first:]
        return hidden, salience, keys[0].transpose(0, 1)[first:] if NEED_ENCODER_KEYS in needs else None


def _mean_received(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Mean over query rows of the softmax attention each key receives, per head, a tile of rows at a time.

    Args:
        queries: [H, Q, d] float32, scaled.
        keys: [H, d, N] float32.

    Returns:
        [H, N] float32; with one query row, its attention.
    """
    if queries.shape[1] == 1:
        return (queries @ keys).softmax(dim=-1)[:, 0]
    received = queries.new_zeros((keys.shape[0], keys.shape[2]))
    for start in range(0, queries.shape[1], _TILE_ROWS):
        received += (queries[:, start : start + _TILE_ROWS] @ keys).softmax(dim=-1).sum(dim=1)
    return received / queries.shape[1]
