"""Every family against transformers, through the engine: the same tokens, and the same logits within rounding."""

from __future__ import annotations

import pytest
import torch

from tests.models.matching import Ours, Theirs
from tests.models.zoo import SPECIMENS

TOKENS = 64


@pytest.fixture(
    scope="module", params=[(name, seed) for name in SPECIMENS for seed in range(3)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def pair(request, tmp_path_factory):
    name, seed = request.param
    directory = tmp_path_factory.mktemp(name)
    specimen = SPECIMENS[name]
    model = specimen.save(directory, seed, older=seed == 1, shards=1 + seed)
    ours = Ours(directory)
    return ours, Theirs(specimen, model, ours.processor)


def test_a_mixed_batch_in_chunks_gives_the_tokens_and_logits_of_transformers(pair):
    ours, theirs = pair
    requests = [ours.request(name, case, TOKENS) for name, case in theirs.cases.items()]
    for request, case in zip(requests, theirs.cases.values(), strict=True):
        assert request.prompt.tokens == theirs.inputs(case)["input_ids"].shape[1]
    tokens = ours.run(requests, max_step_tokens=29)
    for name, case in theirs.cases.items():
        expected, logits = theirs.generate(case, TOKENS)
        assert tokens[name] == expected, name
        torch.testing.assert_close(torch.stack(ours.logits[name]), logits.float(), rtol=0, atol=1e-4)
