from __future__ import annotations

import inspect

import grpc
import pytest

from prismserve.client import Client, RetryPolicy, errors
from tests.client.conftest import Failure

EXPECTED = {
    "OK": errors.InternalServerError,
    "CANCELLED": errors.CancelledError,
    "UNKNOWN": errors.InternalServerError,
    "INVALID_ARGUMENT": errors.BadRequestError,
    "DEADLINE_EXCEEDED": errors.TimeoutExceededError,
    "NOT_FOUND": errors.NotFoundError,
    "ALREADY_EXISTS": errors.BadRequestError,
    "PERMISSION_DENIED": errors.AuthenticationError,
    "RESOURCE_EXHAUSTED": errors.OverloadedError,
    "FAILED_PRECONDITION": errors.BadRequestError,
    "ABORTED": errors.UnavailableError,
    "OUT_OF_RANGE": errors.BadRequestError,
    "UNIMPLEMENTED": errors.UnsupportedError,
    "INTERNAL": errors.InternalServerError,
    "UNAVAILABLE": errors.UnavailableError,
    "DATA_LOSS": errors.InternalServerError,
    "UNAUTHENTICATED": errors.AuthenticationError,
}


def test_every_grpc_status_is_mapped_to_its_error() -> None:
    assert {code.name: kind for code, kind in errors.BY_STATUS.items()} == EXPECTED
    assert {code.name for code in grpc.StatusCode} == set(EXPECTED)


def test_every_error_of_the_tree_is_a_client_error_and_is_shown_in_the_picture_of_the_tree() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]
    for kind in kinds:
        if kind.__module__ == errors.__name__:
            assert issubclass(kind, errors.ClientError)
            assert kind.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - {"OK"}))
def test_a_status_from_a_real_server_arrives_as_its_error_with_sentence_field_and_code(server, name) -> None:
    code = grpc.StatusCode[name]
    server.service.failures.append(Failure(code, "temperature: must be finite", ((errors.FIELD_KEY, "temperature"),)))
    with (
        Client(server.target, retry=RetryPolicy(attempts_max=1), timeout_s=10) as client,
        pytest.raises(EXPECTED[name]) as caught,
    ):
        client.generate("hello")
    assert caught.value.message == "temperature: must be finite"
    assert caught.value.field == "temperature"
    assert caught.value.code is code


@pytest.mark.parametrize(
    ("metadata", "expected_s"),
    [
        ((("retry-after", "2"),), 2.0),
        ((("retry-after", "0.25"),), 0.25),
        ((("grpc-retry-pushback-ms", "1500"),), 1.5),
        ((("retry-after", "soon"),), None),
        ((("retry-after", "-1"),), None),
        ((("retry-after", "nan"),), None),
        ((("retry-after", "inf"),), None),
        ((), None),
    ],
)
def test_retry_after_is_read_from_trailing_metadata_and_nonsense_is_ignored(server, metadata, expected_s) -> None:
    server.service.failures.append(Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", metadata))
    with (
        Client(server.target, retry=RetryPolicy(attempts_max=1), timeout_s=10) as client,
        pytest.raises(errors.OverloadedError) as caught,
    ):
        client.generate("hello")
    assert caught.value.retry_after_s == expected_s


def test_a_request_error_is_also_a_value_error() -> None:
    assert issubclass(errors.RequestError, ValueError)
