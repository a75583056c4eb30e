from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from prismserve.models.processing import Processor
from prismserve.models.reference import reference_path
from prismserve.models.token_bytes import TokenBytes


def test_bytes_of_tokens_joined_are_the_text_even_where_a_character_is_split() -> None:
    processor = Processor.from_directory(reference_path())
    tokens = TokenBytes(processor.tokenizer)
    text = 'red circle, "Größe" 12\n☃ é'
    assert b"".join(tokens.of(token) for token in processor.encode_text(text)) == text.encode()


def test_special_tokens_are_their_names_and_unknown_ids_nothing() -> None:
    processor = Processor.from_directory(reference_path())
    tokens = TokenBytes(processor.tokenizer)
    assert [tokens.of(token) for token in processor.eos_token_ids] == [b"<|end|>"]
    assert tokens.of(processor.vocab_size - 1) == b""


def test_sentencepiece_pieces_keep_their_space_and_byte_pieces_are_bytes() -> None:
    backend = Tokenizer(models.BPE({"<unk>": 0, "\u2581red": 1, "<0xE2>": 2, "a": 3}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert [tokens.of(token) for token in range(4)] == [b"<unk>", b" red", b"\xe2", b"a"]
