"""An untrained model and its processor, in transformers' own classes, and how a trained pair is saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Final

import torch

from prismserve.models.reference.scenes import make_scene
from prismserve.models.reference.vocabulary import COLOR_NAMES, IMAGE_TOKENS, PATCH, SHAPES, SIZE, WORDS

SPECIAL_TOKENS: Final = ("<pad>", "<s>", "<|end|>", "<image>", "<|user|>", "<|assistant|>", "<|system|>", "<unk>")
_PAD, _BOS, _END, _IMAGE, *_ROLES, _UNKNOWN = SPECIAL_TOKENS
PAD, BOS, END, IMAGE, USER, ASSISTANT = range(6)
PIXEL_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD: Final = (0.26862954, 0.26130258, 0.27577711)
VOCABULARY: Final = 768
CONTEXT_TOKENS: Final = 2048
CORPUS_SCENES: Final = 4000
CHAT_TEMPLATE: Final = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}"
    "{% if m['role'] != 'user' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(corpus_scenes: int = CORPUS_SCENES) -> Any:
    """Train a byte-level BPE with single digits on the questions and answers of the first scenes.

    Args:
        corpus_scenes: how many scenes' questions to read; fewer give fewer merges.

    Returns:
        A ``PreTrainedTokenizerFast`` of at most 768 entries whose first eight are ``SPECIAL_TOKENS``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = [text for seed in range(corpus_scenes) for question in make_scene(seed)[1] for text in question[1:]]
    corpus += [word for word in WORDS for _ in range(200)]
    corpus += [f"{color} {shape}" for color in COLOR_NAMES for shape in SHAPES]
    core = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_END,
        unk_token=_UNKNOWN,
        additional_special_tokens=[_IMAGE, *_ROLES],
        padding_side="left",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_processor(corpus_scenes: int = CORPUS_SCENES) -> Any:
    """A ``LlavaProcessor``: a freshly trained tokenizer, CLIP's image processing, the chat template."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    image = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        do_resize=True,
        do_center_crop=True,
        crop_size={"height": SIZE, "width": SIZE},
        do_rescale=True,
        do_normalize=True,
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )
    return LlavaProcessor(
        image_processor=image,
        tokenizer=build_tokenizer(corpus_scenes),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=_IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_model() -> Any:
    """A ``LlavaForConditionalGeneration`` of 5.55M random float32 parameters (see README.md for its sizes)."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    vision_config = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=5,
        projection_dim=160,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="quick_gelu",
    )
    text_config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = PAD, BOS, END
    model = LlavaForConditionalGeneration(config)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, END
    generation.do_sample, generation.max_new_tokens = False, 48
    return model


def save(model: Any, processor: Any, out: Path) -> None:
    """Write bfloat16 weights, configuration and processor files as a Hugging Face checkpoint directory."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.config.dtype = "bfloat16"
    half.save_pretrained(out)
    processor.save_pretrained(out)
    processor.image_processor.save_pretrained(out)  # preprocessor_config.json, which older readers look for
    path = out / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"  # spelling that transformers 4 and 5 both read
    tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    path.write_text(json.dumps(tokenizer, indent=2))
