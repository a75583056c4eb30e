from __future__ import annotations

import pytest
import torch

from prismserve.models.config import DecoderConfig
from prismserve.models.experts import Experts
from tests.models.small import TEXT_CONFIGS


def mixture(name, seed=0):
    config = DecoderConfig.from_hf(TEXT_CONFIGS[name]())
    module = Experts(config, config.experts, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module, torch.randn(17, config.hidden_size, generator=generator)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_a_token_goes_through_its_experts_whatever_it_is_batched_with(name):
    module, x = mixture(name)
    whole = module(x)
    torch.testing.assert_close(torch.cat([module(row[None]) for row in x]), whole)
    torch.testing.assert_close(module(x.flip(0)).flip(0), whole)


def test_no_token_is_dropped_when_all_choose_the_same_expert():
    module, x = mixture("mixtral")
    same = x[:1].expand(50, -1)
    torch.testing.assert_close(module(same), module(x[:1]).expand(50, -1))


@pytest.mark.parametrize(("name", "total"), [("mixtral", 1.0), ("qwen3-moe", 1.0), ("qwen2-moe", None)])
def test_weights_sum_to_one_where_the_family_normalises_them(name, total):
    module, x = mixture(name)
    weights, chosen = module.route(x)
    assert chosen.shape == weights.shape == (17, module.config.per_token)
    if total is not None:
        torch.testing.assert_close(weights.sum(-1), torch.full((17,), total))
    else:
        assert (weights.sum(-1) < 1.0).all()
