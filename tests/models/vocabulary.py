"""One small trained tokenizer that has the control tokens of every family."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONTROLS = [
    *("<pad>", "<s>", "</s>", "<image>", "<video>", "<|im_start|>", "<|im_end|>"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *("<img>", "</img>", "<IMG_CONTEXT>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    *(f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
]
ID = {text: number for number, text in enumerate(CONTROLS)}
SIZE = 384
NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "video_token": "<video>",
}
_TEXTS = [
    "What is the color of the circle on the left? The red one is big, the blue one is small.",
    "Frame 1: is there a square in the second picture?\n\nYes, it is above the triangle.\n",
    "system user assistant 0123456789.0 seconds Here is the original image and here are some crops",
]


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS * 4, trainer)
    return tokenizer.to_str()


def small_tokenizer(image_token: str = "<image>", **named: str) -> PreTrainedTokenizerFast:
    """The tokenizer, with the names processors look their tokens up by."""
    names = {**NAMED, "image_token": image_token, **named}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=names,
    )


TEXT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant"
)


def chat_template(image: str, video: str = "<video>") -> str:
    """Turns between control tokens, with ``image`` where an image stands and ``video`` where a video does."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
        "{% if part.type == 'image' %}" + image + "{% elif part.type == 'video' %}" + video + "{% else %}"
        "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant"
    )
