from __future__ import annotations

import argparse
import io
import signal
import threading

import grpc
import PIL.Image
import pytest

from prismserve.client import Usage
from prismserve.cluster.commands import chat
from prismserve.cluster.commands.connection import printable
from tests.client.conftest import Failure


def run(server, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    return chat.run(parser.parse_args([*arguments, "--grpc", server.target]))


@pytest.fixture
def image(tmp_path) -> str:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (4, 3)).save(stream, format="PNG")
    path = tmp_path / "a.png"
    path.write_bytes(stream.getvalue())
    return str(path)


def test_the_answer_goes_to_standard_output_and_the_exit_code_is_0(server, image, capsys) -> None:
    assert run(server, image, image, "What is it?", "--compression", "off") == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("one two three\n", "")
    (request,) = server.service.requests
    assert [part.WhichOneof("part") for part in request.messages[0].content] == ["image", "image", "text"]
    assert request.compression == "off"
    assert request.sampling.temperature == 0.0


def test_a_system_message_and_no_image_are_fine(server) -> None:
    assert run(server, "hello", "--system", "be brief") == 0
    assert [message.role for message in server.service.requests[0].messages] == ["system", "user"]


def test_usage_goes_to_standard_error_on_request(server, image, capsys) -> None:
    assert run(server, image, "q", "--show-usage") == 0
    out, err = capsys.readouterr()
    assert out == "one two three\n"
    assert "9 in (0 cached), 3 out" in err


def test_usage_text_shows_compression_bytes_and_workers() -> None:
    usage = Usage(
        visual_tokens_before=196,
        visual_tokens_after=49,
        kv_bytes_sent=2048,
        transport="nixl",
        prefill_worker="p-1",
        decode_worker="d-1",
        compression='{"preset":"balanced","visual":{"method":"visionzip"}}',
    )
    text = chat.usage_text(usage)
    for part in ("196 before, 49 after", "(balanced)", "2.0 KiB by nixl", "prefill p-1, decode d-1"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["no.png", "q"], "no.png is not a file"), (["  "], "question is empty"), (["IMAGE"], "question is missing")],
)
def test_wrong_arguments_are_told_in_one_sentence_without_asking(server, image, capsys, arguments, part) -> None:
    assert run(server, *[image if word == "IMAGE" else word for word in arguments]) == 2
    assert part in capsys.readouterr().err
    assert not server.service.calls


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.NOT_FOUND, 2),
        (grpc.StatusCode.UNAUTHENTICATED, 2),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 3),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 4),
        (grpc.StatusCode.INTERNAL, 1),
    ],
)
def test_each_kind_of_failure_has_its_exit_code_and_sentence(server, capsys, code, expected) -> None:
    server.service.failures.append(Failure(code, "the reason"))
    assert run(server, "q") == expected
    assert "error: the reason" in capsys.readouterr().err


def test_without_a_cluster_it_says_how_to_start_one(server, capsys) -> None:
    server.stop()
    assert run(server, "q", "--timeout-s", "2") == 3
    assert "prismserve serve" in capsys.readouterr().err


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where this process was started to ignore it, as in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_request_with_130(server) -> None:
    server.service.pause_s = 30.0

    def interrupt() -> None:
        while not server.service.calls:
            threading.Event().wait(0.01)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run(server, "q") == 130
    thread.join(5)
    assert server.service.cancelled.wait(5)


def test_an_answer_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07c\r\u202ed\n\te\u00e9\U0001f469\u200d\U0001f4bb") == (
        "a[2Jbcd\n\te\u00e9\U0001f469\u200d\U0001f4bb"
    )
