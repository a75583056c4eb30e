from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismserve.core.errors import ModelLoadError
from prismserve.kernels.linear.reference import unpack
from prismserve.models import loader
from prismserve.models.loader import inspect_checkpoint, load_model, model_fingerprint, resolve_dtype
from prismserve.models.reference import reference_path
from tests.models.small import copy_reference, llava_model, save, text_model


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory, change):
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors")


@pytest.fixture
def directory(tmp_path):
    return copy_reference(tmp_path / "model")


def one_sentence(error):
    text = str(error.value)
    return "\n" not in text and len(text) < 1000


def test_the_reference_checkpoint_is_described_without_loading_it():
    info = inspect_checkpoint(reference_path())
    assert (info.architecture, info.family, info.dtype) == ("LlavaForConditionalGeneration", "llava", "bfloat16")
    assert (info.layers, info.kv_heads, info.head_dim, info.max_model_len) == (6, 2, 64, 2048)
    assert (info.image_tokens, info.supports_images) == (196, True)
    assert info.weight_bytes == (reference_path() / "model.safetensors").stat().st_size


def test_a_sharded_text_checkpoint_is_described_without_loading_it(tmp_path):
    save(text_model("qwen3"), tmp_path, shards=3)
    (tmp_path / "tokenizer.json").write_text("{}")
    info = inspect_checkpoint(tmp_path)
    assert (info.architecture, info.family, info.dtype) == ("Qwen3ForCausalLM", "causal_lm", "float32")
    assert not info.supports_images


@pytest.mark.parametrize("act", [inspect_checkpoint, load_model], ids=["inspect", "load"])
class TestDamagedCheckpoints:
    def refused(self, act, directory, match):
        with pytest.raises(ModelLoadError, match=match) as error:
            act(directory)
        assert one_sentence(error)

    def test_no_such_directory(self, act, tmp_path):
        self.refused(act, tmp_path / "nowhere", "does not exist")

    def test_no_configuration(self, act, directory):
        (directory / "config.json").unlink()
        self.refused(act, directory, r"holds no config\.json")

    @pytest.mark.parametrize("content", ["", "{", "[1]", '"text"'])
    def test_damaged_configuration(self, act, directory, content):
        (directory / "config.json").write_text(content)
        self.refused(act, directory, "download the checkpoint again")

    @pytest.mark.parametrize(
        "changes",
        [{"text_config": 3}, {"vision_config": "clip"}, {"image_token_index": "x"}, {"model_type": "no-such-model"}],
    )
    def test_configuration_of_something_else(self, act, directory, changes):
        edit_config(directory, **changes)
        self.refused(act, directory, "model")

    def test_unsupported_architecture_lists_the_supported(self, act, directory):
        edit_config(directory, architectures=["GPT2LMHeadModel"])
        self.refused(act, directory, "LlamaForCausalLM, LlavaForConditionalGeneration, LlavaNext")

    def test_no_architecture(self, act, directory):
        edit_config(directory, architectures=[])
        self.refused(act, directory, "supported: ")

    def test_quantised_weights(self, act, directory):
        edit_config(directory, quantization_config={"quant_method": "awq"})
        self.refused(act, directory, "quantised")

    def test_no_weights(self, act, directory):
        (directory / "model.safetensors").unlink()
        self.refused(act, directory, "no safetensors weights")

    def test_missing_shard(self, act, tmp_path):
        save(text_model("llama"), tmp_path, shards=3)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        self.refused(act, tmp_path, r"lacks model-00002-of-00003\.safetensors")

    def test_shard_outside_the_directory(self, act, tmp_path):
        save(text_model("llama"), tmp_path / "model", shards=2)
        index = tmp_path / "model" / "model.safetensors.index.json"
        (tmp_path / "other.safetensors").touch()
        index.write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
        self.refused(act, tmp_path / "model", r"lacks \.\./|lacks other")

    @pytest.mark.parametrize("length", [0, 4, 100, 100_000])
    def test_truncated_shard(self, act, directory, length):
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])
        self.refused(act, directory, "truncated")

    def test_garbled_shard(self, act, directory):
        (directory / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b"x" * 64)
        self.refused(act, directory, "damaged safetensors header")


@pytest.mark.parametrize("name", ["tokenizer.json"])
def test_a_missing_tokenizer_is_found_by_inspection(directory, name):
    (directory / name).unlink()
    with pytest.raises(ModelLoadError, match=rf"lacks {name}"):
        inspect_checkpoint(directory)


def test_a_missing_image_processor_is_found_by_inspection(directory):
    (directory / "preprocessor_config.json").unlink()
    inspect_checkpoint(directory)
    (directory / "processor_config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"lacks preprocessor_config\.json"):
        inspect_checkpoint(directory)


def test_missing_weights_are_named(directory):
    edit_weights(directory, lambda state: state.pop("language_model.model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(ModelLoadError, match=r"lacks 1 of \d+ weights: decoder\.layers\.3\.mlp\.up_proj\.weight"):
        load_model(directory)


def test_a_weight_of_another_shape_is_named_with_both_shapes(directory):
    def shrink(state):
        state["language_model.model.norm.weight"] = state["language_model.model.norm.weight"][:8].clone()

    edit_weights(directory, shrink)
    with pytest.raises(ModelLoadError, match=r"norm\.weight has shape \[8\], but config\.json asks for \[256\]"):
        load_model(directory)


def test_a_weight_that_is_no_float_is_refused(directory):
    def cast(state):
        state["language_model.model.norm.weight"] = state["language_model.model.norm.weight"].to(torch.int8)

    edit_weights(directory, cast)
    with pytest.raises(ModelLoadError, match="stored as I8"):
        load_model(directory)


def test_weights_a_model_does_not_use_are_left_alone(directory):
    edit_weights(directory, lambda state: state.update({"rotary_emb.inv_freq": torch.zeros(2)}))
    load_model(directory)


def test_progress_ends_at_the_total():
    seen = []
    load_model(reference_path(), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 10_000_000


def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr(loader, "_cpu_flags", lambda: frozenset({"avx2"}))
    assert resolve_dtype("auto", "cpu") == torch.float32
    monkeypatch.setattr(loader, "_cpu_flags", lambda: frozenset({"avx2", "amx_bf16"}))
    assert resolve_dtype("auto", "cpu") == torch.bfloat16
    assert resolve_dtype("auto", "cuda:0") == torch.bfloat16
    assert resolve_dtype("float32", "cuda:0") == torch.float32


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ModelLoadError, match="auto, float32 or bfloat16"):
        load_model(reference_path(), dtype="float16")


def test_fingerprints_follow_content_and_dtype_and_nothing_else(tmp_path, directory):
    original = model_fingerprint(reference_path(), "float32")
    assert len(original) == 32
    assert model_fingerprint(directory, "float32") == original
    assert load_model(directory, dtype="float32").fingerprint == original
    assert model_fingerprint(directory, "bfloat16") != original
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert model_fingerprint(directory, "float32") != original
    edit_config(copy_reference(tmp_path / "other"), vision_feature_layer=-2)
    assert model_fingerprint(tmp_path / "other", "float32") != original


def test_a_loaded_model_knows_its_checkpoint():
    model = load_model(reference_path(), dtype="float32")
    assert model.eos_token_ids == {2}
    assert (model.image_token_id, model.max_model_len, model.vocab_size) == (3, 2048, 768)
    assert model.encoder_fingerprint != model.fingerprint
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_new_family_is_one_file(tmp_path, monkeypatch):
    from prismserve.models import checkpoint, families

    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "apertus.py").write_text(
        "from prismserve.models.families.causal_lm import CausalLM\n"
        "class Renamed(CausalLM):\n    architectures = ('RenamedForCausalLM',)\n"
        "FAMILY = Renamed()\n"
    )
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    checkpoint.families.cache_clear()
    try:
        directory = save(text_model("llama"), tmp_path / "model")
        edit_config(directory, architectures=["RenamedForCausalLM"])
        assert load_model(directory).vocab_size == 96
    finally:
        checkpoint.families.cache_clear()
        sys.modules.pop("prismserve.models.families.apertus")


def stored(linear):
    return unpack(linear.weight) if linear.packed else linear.weight


def test_llava_embeddings_are_filled_in_fused_parts(tmp_path):
    theirs = llava_model(1)
    ours = load_model(save(theirs, tmp_path), dtype="float32")
    layer, other = ours.decoder.layers[1], theirs.model.language_model.layers[1]
    parts = [other.self_attn.q_proj.weight, other.self_attn.k_proj.weight, other.self_attn.v_proj.weight]
    assert torch.equal(stored(layer.qkv), torch.cat(parts))
    assert torch.equal(stored(layer.gate_up), torch.cat([other.mlp.gate_proj.weight, other.mlp.up_proj.weight]))
