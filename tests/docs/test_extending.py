"""The documentation's promise: an extension is one file. The files on its pages work as they stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

from prismserve.compression import codec as codecs
from prismserve.compression import loader, prefill, presets, visual
from prismserve.compression.apply import apply_visual
from prismserve.compression.base import VisualFeatures
from prismserve.compression.cuts import CutInputs, Grid
from prismserve.core.errors import IncompatibleLayoutError, ModelLoadError, UnknownMethodError
from prismserve.core.types import KVLayout
from prismserve.models import checkpoint
from prismserve.models import families as model_families
from prismserve.models.loader import inspect_checkpoint
from tests.models.matching import Ours, Theirs
from tests.models.small import randomise
from tests.models.vocabulary import ID
from tests.models.zoo import SPECIMENS, TEXT, VISION, Specimen

ROOT = Path(__file__).resolve().parents[2]


def example(page: str) -> str:
    """The one Python file a page shows."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture
def add_file(tmp_path, monkeypatch):
    """Put a file into a package, as adding it to the tree would."""

    def add(package, name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        loader.forget()
        checkpoint.families.cache_clear()
        added.append(f"{package.__name__}.{name}")

    added: list[str] = []
    yield add
    monkeypatch.undo()
    loader.forget()
    checkpoint.families.cache_clear()
    for module in added:
        sys.modules.pop(module, None)


def test_a_visual_method_is_one_file(add_file):
    with pytest.raises(UnknownMethodError):
        presets.resolve({"visual": {"method": "middle"}}, "off")
    add_file(visual, "middle", example("add_a_visual_method.md"))
    spec = presets.resolve({"visual": {"method": "middle", "keep": 4}}, "off").visual
    tokens = torch.arange(36.0).reshape(36, 1)
    kept, indices = apply_visual(VisualFeatures(tokens=tokens, grid=(6, 6), seed=bytes(8)), spec)
    assert indices.tolist() == [14, 15, 20, 21]
    assert torch.equal(kept[:, 0], torch.tensor([14.0, 15.0, 20.0, 21.0]))
    assert loader.kept_tokens(spec, 36) == 4


def test_a_prefill_method_is_one_file(add_file):
    add_file(prefill, "loudest", example("add_a_prefill_method.md"))
    spec = presets.resolve({"prefill": {"method": "loudest", "keep": 2, "layer": 3}}, "off").prefill
    method, config = loader.prefill_method(spec.name), loader.config_of(spec, "prefill")
    assert [cut.layer for cut in method.cuts(config, 6)] == [3]
    assert method.kept_tokens(config, 6, 4) == (2,)
    inputs = CutInputs(
        layers=6,
        cut_layers=(3,),
        history=(4,),
        grids=(Grid(1, 2, 2),),
        medium=torch.zeros(4, dtype=torch.int64),
        places=torch.arange(4),
        sizes=torch.ones(4),
        seed=bytes(8),
        hidden=torch.tensor([[1.0], [-5.0], [2.0], [0.0]]),
    )
    assert method.plan(0, inputs, config).indices.tolist() == [1, 2]


def test_a_codec_is_one_file(add_file):
    add_file(codecs, "half", example("add_a_codec.md"))
    spec = presets.resolve({"wire": {"codec": "half"}}, "off").wire
    codec, config = loader.codec(spec.name), loader.config_of(spec, "codec")
    keys, values = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    layout = layout_of(kv_heads=2, head_dim=8)
    encoded = codec.encode(keys, values, config)
    assert encoded.numel() == codec.encoded_bytes(5, layout, config) == 5 * 2 * 8 * 2 * 2
    for original, restored in zip((keys, values), codec.decode(encoded, 5, layout, config), strict=True):
        assert torch.equal(restored, original.to(torch.bfloat16).float())
    with pytest.raises(IncompatibleLayoutError, match="must have"):
        codec.decode(encoded[:-1], 5, layout, config)


def vip_llava(seed):
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_id=ID["<image>"],
        vision_feature_layer=[-2, 1],
        tie_word_embeddings=False,
    )
    return randomise(VipLlavaForConditionalGeneration(config), seed)


def test_a_model_family_is_one_file(add_file, tmp_path):
    llava = SPECIMENS["llava"]
    specimen = Specimen(vip_llava, llava.processor, hub_key=llava.hub_key)
    directory = tmp_path / "checkpoint"
    model = specimen.save(directory, older=True)
    with pytest.raises(ModelLoadError, match=r"'VipLlavaForConditionalGeneration' .* is not supported"):
        inspect_checkpoint(directory)
    add_file(model_families, "vip_llava", example("add_a_model_family.md"))
    ours = Ours(directory)
    theirs = Theirs(specimen, model, ours.processor)
    tokens = ours.run([ours.request(name, case, 12) for name, case in theirs.cases.items()], max_step_tokens=29)
    for name, case in theirs.cases.items():
        expected, logits = theirs.generate(case, 12)
        assert tokens[name] == expected, name
        torch.testing.assert_close(torch.stack(ours.logits[name]), logits.float(), rtol=0, atol=1e-4)


def layout_of(kv_heads: int, head_dim: int) -> KVLayout:
    return KVLayout(dtype="float32", layers=1, kv_heads=kv_heads, head_dim=head_dim, block_tokens=16)


def test_the_examples_are_gone_afterwards():
    assert "middle" not in loader.names("visual")
    assert "loudest" not in loader.names("prefill")
    assert "half" not in loader.names("codec")
    assert "VipLlavaForConditionalGeneration" not in checkpoint.families()


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("add_a_*.md")))
def test_every_file_that_a_page_names_exists(page):
    text = (ROOT / "docs" / page).read_text()
    named = set(re.findall(r"`((?:prismserve|tests|benchmarks)/[a-z_/]+(?:\.py)?)`", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    index = (ROOT / "docs" / "README.md").read_text()
    assert f"]({page})" in index
