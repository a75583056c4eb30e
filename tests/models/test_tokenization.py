"""Guarding must change nothing for any kind of tokenizer, but for control tokens that users type."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prismserve.models.tokenization import GuardedTokenizer

CORPUS = ["the red circle is left of the blue star", "USER: what is this? ASSISTANT: a picture of a cat"] * 20
CONTROLS = ["<unk>", "<s>", "</s>"]


def sentencepiece_bpe():
    """As Llama's: spaces become a visible mark in front of the text, BOS by the post-processor."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, special_tokens=CONTROLS))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram():
    """As T5's: control tokens are pieces of the model's own vocabulary too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=CONTROLS, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(params=[sentencepiece_bpe, unigram], ids=lambda build: build.__name__)
def tokenizer(request):
    backend = request.param()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.add_tokens(
        [AddedToken("<image>", special=False, normalized=False), AddedToken("<|sep|>", special=True, lstrip=True)]
    )
    return wrapped


@pytest.mark.parametrize(
    "rendered",
    ["USER: <image>\nwhat is this? ASSISTANT:", "<s>the  red <|sep|> circle</s>", "<image><image>", "", " ", "é<s>é"],
)
@pytest.mark.parametrize("add", [True, False])
def test_rendered_text_gives_the_ids_of_the_tokenizer(tokenizer, rendered, add):
    guarded = GuardedTokenizer(tokenizer, frozenset({"<image>"}))
    expected = tokenizer(rendered, add_special_tokens=add)["input_ids"]
    assert guarded.encode_rendered(rendered, add_special_tokens=add) == expected


def test_typed_control_tokens_are_text_beside_written_ones(tokenizer):
    guarded = GuardedTokenizer(tokenizer, frozenset({"<image>"}))
    typed = guarded.guard(" <s>the <image></s> <|sep|>")
    ids = guarded.encode_rendered(f"<image>{typed}</s>", add_special_tokens=False)
    image, end = tokenizer.convert_tokens_to_ids(["<image>", "</s>"])
    controls = {image, end, *tokenizer.convert_tokens_to_ids(["<s>", "<|sep|>"])}
    assert (ids[0], ids[-1]) == (image, end)
    assert not controls & set(ids[1:-1])


def test_texts_cannot_be_joined_to_a_control_token(tokenizer):
    guarded = GuardedTokenizer(tokenizer, frozenset({"<image>"}))
    joined = "".join(map(guarded.guard, "<image>"))
    assert tokenizer.convert_tokens_to_ids("<image>") not in guarded.encode_rendered(joined, add_special_tokens=False)


def test_spellings_differ_between_instances_and_surrounding_space_is_kept(tokenizer):
    one, other = GuardedTokenizer(tokenizer), GuardedTokenizer(tokenizer)
    assert one.guard("<s>") != other.guard("<s>")
    assert one.guard("  \n") == "  \n"
    assert one.guard(" a\n").strip() != one.guard(" a\n")


def test_a_placeholder_that_is_no_token_is_hidden_when_typed_and_left_alone_when_written(tokenizer):
    guarded = GuardedTokenizer(tokenizer, frozenset({"<clip>"}))
    typed = guarded.guard("the <clip>")
    assert "<clip>" not in typed
    plain = tokenizer("the <clip> <clip>", add_special_tokens=False)["input_ids"]
    assert guarded.encode_rendered(f"{typed} <clip>", add_special_tokens=False) == plain
