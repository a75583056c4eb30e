"""A small random checkpoint of every family that sees, and what transformers reads it with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from tests.models.small import randomise, save
from tests.models.vocabulary import ID, SIZE, TEXT_TEMPLATE, chat_template, small_tokenizer

TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": SIZE,
    "max_position_embeddings": 2048,
    "bos_token_id": ID["<s>"],
    "eos_token_id": ID["</s>"],
    "pad_token_id": ID["<pad>"],
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]


# Its processor takes a helper from the module that needs torchvision; Pillow's has the same one.
sys.modules["transformers.models.pixtral.image_processing_pixtral"] = image_processing_pil_pixtral
from transformers.models.pixtral.processing_pixtral import PixtralProcessor  # noqa: E402 - after its substitute

del sys.modules["transformers.models.pixtral.image_processing_pixtral"]


def without_video(processor_class: Any) -> Any:
    """A processor class that can be made where the libraries for reading video files are absent."""
    return type(processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": lambda *_: None})


# Spells out numbers of frames in prompts with videos; missing, it would keep the processor from reading images too.
processing_smolvlm.num2words = {2: "two", 3: "three", 5: "five"}.__getitem__


@dataclass(frozen=True)
class Specimen:
    """A family's smallest checkpoint.

    Attributes:
        model: transformers' model from a seed.
        processor: transformers' processor.
        placeholder: what its chat template writes for an image.
        hub_key: a current key to the hub's older layout, where there is one.
        sees: whether it takes images.
        video: what its chat template writes for a video, if it takes any.
        video_pixels: the name its model takes pixels of frames under.
    """

    model: Callable[[int], Any]
    processor: Callable[[], Any]
    placeholder: str = "<image>"
    hub_key: Callable[[str], str] | None = None
    sees: bool = True
    video: str = ""
    video_pixels: str = "pixel_values_videos"

    def save(self, directory: Path, seed: int = 0, *, older: bool = False, shards: int = 1) -> Any:
        """Write the checkpoint; returns transformers' model."""
        model, processor = self.model(seed), self.processor()
        rename = self.hub_key if older and self.hub_key is not None else (lambda key: key)
        save(model, directory, rename, shards)
        processor.tokenizer.save_pretrained(directory)
        template = TEXT_TEMPLATE
        if self.sees:
            processor.image_processor.save_pretrained(directory)
            template = chat_template(self.placeholder, self.video)
        (directory / "chat_template.jinja").write_text(template)
        return model


def _model(model_class: Any, config: Any) -> Callable[[int], Any]:
    return lambda seed: randomise(model_class(config()), seed)


def _llava_key(key: str) -> str:
    key = key.removeprefix("model.")
    key = key.replace("vision_tower.", "vision_tower.vision_model.", 1) if key.startswith("vision_tower.") else key
    if key.startswith("language_model."):
        return key.replace("language_model.", "language_model.model.", 1)
    return f"language_model.{key}" if key.startswith("lm_head") else key


def _llava_config() -> LlavaConfig:
    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**TEXT)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=ID["<image>"])


def _llava_processor() -> LlavaProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        images, small_tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _next_config() -> LlavaNextConfig:
    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**TEXT)
    return LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_id=ID["<image>"], image_grid_pinpoints=PINPOINTS
    )


def _next_processor() -> LlavaNextProcessor:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        images, small_tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _onevision_config() -> LlavaOnevisionConfig:
    vision, text = SiglipVisionConfig(**VISION, vision_use_head=False), Qwen2Config(**TEXT)
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ID["<image>"],
        video_token_id=ID["<video>"],
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=False,
    )


def _onevision_processor() -> LlavaOnevisionProcessor:
    images = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS)
    return without_video(LlavaOnevisionProcessor)(
        images,
        small_tokenizer(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )


def _idefics_config(kind: Any = Idefics3Config) -> Any:
    vision = {**VISION, "max_image_size": {"longest_edge": 32}}
    text = LlamaConfig(**TEXT)
    return kind(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=ID["<image>"],
        scale_factor=2,
        pad_token_id=ID["<pad>"],
        tie_word_embeddings=False,
    )


def _idefics_processor(kind: Any = Idefics3Processor, images: Any = Idefics3ImageProcessorPil, **extra: Any) -> Any:
    image_processor = images(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return kind(image_processor, small_tokenizer(), image_seq_len=4, **extra)


def _internvl_config() -> InternVLConfig:
    vision = {**VISION, "image_size": [32, 32], "patch_size": [8, 8], "model_type": "internvl_vision"}
    return InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT).to_dict(),
        image_token_id=ID["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def _internvl_processor() -> InternVLProcessor:
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, min_patches=1, max_patches=4)
    return without_video(InternVLProcessor)(images, small_tokenizer("<IMG_CONTEXT>"), image_seq_length=4)


def _qwen_key(key: str) -> str:
    return key.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


def _qwen_config(kind: Any, rope: dict[str, Any], **vision: Any) -> Any:
    text = {**TEXT, "head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope}}
    return kind(
        vision_config={"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision},
        text_config=text,
        image_token_id=ID["<|image_pad|>"],
        video_token_id=ID["<|video_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"],
        vision_end_token_id=ID["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def _qwen2_vl_config() -> Qwen2VLConfig:
    return _qwen_config(
        Qwen2VLConfig, {"mrope_section": [2, 3, 1]}, depth=2, embed_dim=32, hidden_size=48, num_heads=4, mlp_ratio=2
    )


def _qwen2_5_vl_config() -> Qwen2_5_VLConfig:
    return _qwen_config(
        Qwen2_5_VLConfig,
        {"mrope_section": [2, 2, 2]},
        depth=3,
        hidden_size=32,
        intermediate_size=40,
        out_hidden_size=48,
        num_heads=4,
        window_size=32,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    )


def _qwen3_vl_config() -> Qwen3VLConfig:
    return _qwen_config(
        Qwen3VLConfig,
        {"mrope_section": [2, 2, 2], "mrope_interleaved": True},
        depth=3,
        hidden_size=32,
        intermediate_size=40,
        out_hidden_size=48,
        num_heads=4,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0, 2],
    )


def _qwen_processor(kind: Any) -> Any:
    images = Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 16 * 16 * 4, "longest_edge": 16 * 16 * 25},
    )
    return without_video(kind)(images, small_tokenizer("<|image_pad|>", video_token="<|video_pad|>"))


def _gemma_config() -> Gemma3Config:
    text = {**TEXT, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 13, "sliding_window_pattern": 3}
    return Gemma3Config(
        vision_config={**VISION, "vision_use_head": False},
        text_config=text,
        image_token_id=ID["<image_soft_token>"],
        boi_token_index=ID["<start_of_image>"],
        eoi_token_index=ID["<end_of_image>"],
        mm_tokens_per_image=4,
    )


def _gemma_processor() -> Gemma3Processor:
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return Gemma3Processor(images, small_tokenizer("<image_soft_token>"), image_seq_length=4)


def _mistral_key(key: str) -> str:
    return _llava_key(key).replace("vision_tower.vision_model.", "vision_tower.", 1)


def _mistral_config() -> Mistral3Config:
    vision = PixtralVisionConfig(**{**VISION, "image_size": 64})
    return Mistral3Config(
        vision_config=vision,
        text_config=MistralConfig(**TEXT, head_dim=16, sliding_window=None),
        image_token_id=ID["[IMG]"],
        tie_word_embeddings=False,
    )


def _mistral_processor() -> PixtralProcessor:
    images = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    return PixtralProcessor(images, small_tokenizer("[IMG]"), patch_size=8, spatial_merge_size=2)


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def _text(config: Any, **extra: Any) -> Specimen:
    def model(seed: int) -> Any:
        return randomise(AutoModelForCausalLM.from_config(config(**{**TEXT, **extra})), seed)

    return Specimen(model, lambda: SimpleNamespace(tokenizer=small_tokenizer()), sees=False)


_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

SPECIMENS = {
    "llama": _text(LlamaConfig),
    "mistral": _text(MistralConfig, sliding_window=19),
    "mixtral": _text(MixtralConfig, num_local_experts=5, num_experts_per_tok=2),
    "qwen2": _text(Qwen2Config, tie_word_embeddings=True),
    "qwen2_moe": _text(Qwen2MoeConfig, **_EXPERTS, shared_expert_intermediate_size=40, mlp_only_layers=[1]),
    "qwen3": _text(Qwen3Config, head_dim=16),
    "qwen3_moe": _text(Qwen3MoeConfig, **_EXPERTS, head_dim=16, norm_topk_prob=True),
    "gemma3_text": _text(
        Gemma3TextConfig, head_dim=16, query_pre_attn_scalar=24, sliding_window=13, sliding_window_pattern=3
    ),
    "llava": Specimen(_model(LlavaForConditionalGeneration, _llava_config), _llava_processor, hub_key=_llava_key),
    "llava_next": Specimen(
        _model(LlavaNextForConditionalGeneration, _next_config), _next_processor, hub_key=_llava_key
    ),
    "llava_onevision": Specimen(
        _model(LlavaOnevisionForConditionalGeneration, _onevision_config),
        _onevision_processor,
        hub_key=_llava_key,
        video="<video>",
    ),
    "idefics3": Specimen(_model(Idefics3ForConditionalGeneration, _idefics_config), _idefics_processor),
    "smolvlm": Specimen(
        _model(SmolVLMForConditionalGeneration, lambda: _idefics_config(SmolVLMConfig)),
        lambda: _idefics_processor(without_video(SmolVLMProcessor), SmolVLMImageProcessorPil, video_processor=None),
        video="<video>",
        video_pixels="pixel_values",
    ),
    "internvl": Specimen(
        _model(InternVLForConditionalGeneration, _internvl_config),
        _internvl_processor,
        "<IMG_CONTEXT>",
        hub_key=_llava_key,
        video="<video>",
    ),
    "qwen2_vl": Specimen(
        _model(Qwen2VLForConditionalGeneration, _qwen2_vl_config),
        lambda: _qwen_processor(Qwen2VLProcessor),
        _QWEN_IMAGE,
        hub_key=_qwen_key,
        video=_QWEN_VIDEO,
    ),
    "qwen2_5_vl": Specimen(
        _model(Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl_config),
        lambda: _qwen_processor(Qwen2_5_VLProcessor),
        _QWEN_IMAGE,
        hub_key=_qwen_key,
        video=_QWEN_VIDEO,
    ),
    "qwen3_vl": Specimen(
        _model(Qwen3VLForConditionalGeneration, _qwen3_vl_config),
        lambda: _qwen_processor(Qwen3VLProcessor),
        _QWEN_IMAGE,
        video=_QWEN_VIDEO,
    ),
    "mistral3": Specimen(
        _model(Mistral3ForConditionalGeneration, _mistral_config),
        _mistral_processor,
        "[IMG]",
        hub_key=_mistral_key,
    ),
    "gemma3": Specimen(
        _model(Gemma3ForConditionalGeneration, _gemma_config),
        _gemma_processor,
        "<start_of_image>",
        hub_key=_llava_key,
    ),
}

SEEING = [name for name, specimen in SPECIMENS.items() if specimen.sees]
WATCHING = [name for name, specimen in SPECIMENS.items() if specimen.video]
