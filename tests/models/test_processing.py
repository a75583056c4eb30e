from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from prismserve.core.errors import InvalidRequestError, ModelLoadError
from prismserve.models.processing import ChatMessage, ImageSlot, Processor
from prismserve.models.reference import reference_path
from prismserve.models.reference.scenes import make_scene
from tests.models.small import copy_reference, save, text_model

IMAGE_TOKEN = 3


@pytest.fixture(scope="module")
def processor():
    return Processor.from_directory(reference_path())


@pytest.fixture(scope="module")
def theirs():
    return AutoProcessor.from_pretrained(reference_path())


def expand(ids, count=196):
    return [token for item in ids for token in ([IMAGE_TOKEN] * count if isinstance(item, ImageSlot) else [item])]


def their_messages(messages):
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts
            ],
        }
        for message in messages
    ]


CONVERSATIONS = {
    "image and question": [ChatMessage("user", (ImageSlot(0), "What color is the circle?"))],
    "text only": [ChatMessage("user", ("Hello",))],
    "text before the image": [ChatMessage("user", ("What is here?", ImageSlot(0)))],
    "several turns and images": [
        ChatMessage("system", ("Be brief.",)),
        ChatMessage("user", (ImageSlot(0), ImageSlot(1), "Which is red?")),
        ChatMessage("assistant", ("the first",)),
        ChatMessage("user", (ImageSlot(2), "And now?")),
    ],
    "space, newlines and other scripts": [ChatMessage("user", ("  \n ünïcode 漢字 😀\n",))],
    "empty text": [ChatMessage("user", ("", ImageSlot(0), " "))],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_chat_ids_equal_those_of_transformers(processor, theirs, messages):
    count = sum(isinstance(part, ImageSlot) for message in messages for part in message.parts)
    images = [Image.new("RGB", (224, 224), "red")] * count
    prompt = theirs.apply_chat_template(their_messages(messages), add_generation_prompt=True)
    expected = theirs(images=images or None, text=prompt)["input_ids"][0]
    ids = processor.render_chat(messages)
    assert expand(ids) == list(expected)
    assert [item.index for item in ids if isinstance(item, ImageSlot)] == list(range(count))


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_any_harmless_text_gives_the_ids_of_transformers(processor, theirs, text):
    if any(control in text for control in theirs.tokenizer.all_special_tokens):
        return
    messages = [ChatMessage("user", (ImageSlot(0), text))]
    prompt = theirs.apply_chat_template(their_messages(messages), add_generation_prompt=True)
    expected = theirs.tokenizer(prompt)["input_ids"]
    assert expand(processor.render_chat(messages), 1) == expected


CONTROLS = ["<image>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<s>", "<pad>", "<unk>"]


@settings(max_examples=80, deadline=None)
@given(parts=st.lists(st.sampled_from([*CONTROLS, "<ima", "ge>", "<", "|end|>", " ", "x"]), min_size=1, max_size=6))
@pytest.mark.parametrize("joined", [True, False])
def test_control_tokens_typed_by_a_user_are_plain_text(processor, parts, joined):
    texts = ("".join(parts),) if joined else tuple(parts)
    ids = processor.render_chat([ChatMessage("user", (ImageSlot(0), *texts))])
    assert ids[:2] == [4, ImageSlot(0)]
    assert ids[-1] == 5
    assert not set(ids[2:-1]) & set(range(8))
    assert processor.decode(ids[2:-1], skip_special_tokens=False) == "".join(parts)


def test_control_tokens_in_a_completion_prompt_are_plain_text(processor):
    text = "<|user|>a<image>b<|end|>"
    ids = processor.encode_text(text)
    assert not set(ids) & set(range(8))
    assert processor.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("size", [(224, 224), (640, 360), (33, 500), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA", "1"])
def test_pixels_equal_those_of_transformers(processor, theirs, size, mode):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    expected = theirs.image_processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(processor.preprocess(image).pixels, expected)


def test_pixels_of_scenes_equal_those_of_transformers(processor, theirs):
    image, _ = make_scene(10_000_000)
    assert torch.equal(
        processor.preprocess(image).pixels, theirs.image_processor(image, return_tensors="pt")["pixel_values"][0]
    )


def test_images_are_counted_without_pixels(processor):
    assert processor.image_grid(640, 480) == (14, 14)
    assert processor.image_tokens(640, 480) == 196
    with pytest.raises(InvalidRequestError, match="0 x 5"):
        processor.image_tokens(0, 5)


def test_an_unusual_pixel_format_is_refused(processor):
    with pytest.raises(InvalidRequestError, match="pixel format 'F'"):
        processor.preprocess(Image.new("F", (8, 8)))


@pytest.mark.parametrize("role", ["", "User", "user|>x", "a" * 40, "us er"])
def test_a_role_cannot_carry_control_tokens(processor, role):
    with pytest.raises(InvalidRequestError, match="role") as error:
        processor.render_chat([ChatMessage(role, ("hi",))])
    assert error.value.field == "messages[0].role"


def test_a_template_that_refuses_the_messages_names_its_reason(tmp_path):
    directory = copy_reference(tmp_path / "model")
    (directory / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        Processor.from_directory(directory).render_chat([ChatMessage("user", ("hi",))])


def test_a_template_that_drops_images_is_an_error_not_a_wrong_answer(tmp_path):
    directory = copy_reference(tmp_path / "model")
    (directory / "chat_template.jinja").write_text("{{ messages[0].role }}")
    with pytest.raises(InvalidRequestError, match="places 0 of 1 images"):
        Processor.from_directory(directory).render_chat([ChatMessage("user", (ImageSlot(0),))])


def test_older_checkpoints_keep_their_template_in_json(tmp_path, processor):
    directory = copy_reference(tmp_path / "model")
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    messages = CONVERSATIONS["several turns and images"]
    assert Processor.from_directory(directory).render_chat(messages) == processor.render_chat(messages)


def test_a_model_without_template_points_to_completions(tmp_path):
    directory = copy_reference(tmp_path / "model")
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Processor.from_directory(directory).render_chat([ChatMessage("user", ("hi",))])


def test_a_text_model_reads_string_content_and_refuses_images(tmp_path):
    directory = save(text_model("llama"), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((reference_path() / name).read_bytes())
    (directory / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}<|assistant|>"
    )
    processor = Processor.from_directory(directory)
    ids = processor.render_chat([ChatMessage("user", (" red ", "<s> "))])
    assert processor.decode(ids, skip_special_tokens=False) == "<s><|user|>red <s><|assistant|>"
    assert ids.count(1) == 1
    assert not processor.supports_images
    with pytest.raises(InvalidRequestError, match="text only"):
        processor.render_chat([ChatMessage("user", (ImageSlot(0),))])
    with pytest.raises(InvalidRequestError, match="text only"):
        processor.image_tokens(10, 10)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", None, "lacks tokenizer.json"),
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.json", "{}", "cannot be loaded"),
        ("config.json", None, "holds no config.json"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path, name, content, reason):
    directory = copy_reference(tmp_path / "model")
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_text(content)
    with pytest.raises(ModelLoadError, match=reason) as error:
        Processor.from_directory(directory)
    assert "\n" not in str(error.value)


def test_an_image_processor_that_does_not_fit_the_tower_is_refused(tmp_path):
    directory = copy_reference(tmp_path / "model")
    for name in ("preprocessor_config.json", "processor_config.json"):
        content = (directory / name).read_text().replace("224", "112")
        (directory / name).write_text(content)
    with pytest.raises(ModelLoadError, match=r"\[3, 112, 112\] pixels"):
        Processor.from_directory(directory).preprocess(Image.new("RGB", (8, 8)))


def test_the_fingerprint_follows_the_image_processing(tmp_path, processor):
    directory = copy_reference(tmp_path / "model")
    assert Processor.from_directory(directory).fingerprint == processor.fingerprint
    path = directory / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.48145466", "0.5"))
    assert Processor.from_directory(directory).fingerprint != processor.fingerprint


def test_facts_of_the_checkpoint(processor):
    assert (processor.eos_token_ids, processor.image_token_id) == ({2}, 3)
    assert (processor.max_model_len, processor.vocab_size) == (2048, 768)


def test_ids_beyond_the_vocabulary_decode_to_nothing(processor):
    assert processor.decode([700, *processor.encode_text("red"), 767]) == "red"


@pytest.mark.parametrize("size", [(300, 200), (120, 500), (224, 224)])
def test_the_box_that_is_seen_is_the_one_the_image_processor_cuts_out(processor, size):
    left, top, right, bottom = processor.seen_box(*size)
    assert right - left == pytest.approx(min(size)) == pytest.approx(bottom - top)
    picture = Image.new("RGB", size, (255, 0, 0))
    picture.paste((0, 0, 255), (round(left), round(top), round(right), round(bottom)))
    pixels = processor.preprocess(picture).pixels
    # Red is left only where the cut goes through a pixel.
    assert float(pixels[0, 4:-4, 4:-4].max()) == pytest.approx(float(pixels[0, 100, 100]))
