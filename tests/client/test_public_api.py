"""The SDK's public surface, written out: a change here is a change for every user."""

from __future__ import annotations

import inspect

import prismserve.client as sdk

NAMES = [
    "Answer",
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "CancelledError",
    "Choice",
    "Client",
    "ClientClosedError",
    "ClientError",
    "ClusterStatus",
    "Delta",
    "GenerateOptions",
    "Image",
    "IncompleteAnswerError",
    "InternalServerError",
    "Message",
    "Model",
    "NotFoundError",
    "OverloadedError",
    "RequestError",
    "RetryPolicy",
    "TimeoutExceededError",
    "TokenLogprob",
    "UnavailableError",
    "UnsupportedError",
    "Usage",
    "Video",
    "WorkerStatus",
]

METHODS = {
    "close": ["self"],
    "generate": ["self", "messages", "options"],
    "models": ["self", "timeout_s"],
    "set_preset": ["self", "preset", "control", "timeout_s"],
    "status": ["self", "timeout_s"],
    "stream": ["self", "messages", "options"],
}
INIT = ["self", "target", "api_key", "credentials", "timeout_s", "retry"]
OPTIONS = [
    "prompt",
    "images",
    "videos",
    "model",
    "compression",
    "cache_salt",
    "request_id",
    "timeout_s",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logit_bias",
    "logprobs",
    "n",
    "json_schema",
    "json_object",
    "regex",
    "grammar",
    "choice",
]


def public(kind: type) -> dict[str, list[str]]:
    members = inspect.getmembers(kind, inspect.isfunction)
    return {name: list(inspect.signature(member).parameters) for name, member in members if name[0] != "_"}


def test_the_names_are_these() -> None:
    assert sorted(sdk.__all__) == sorted(NAMES)
    assert all(hasattr(sdk, name) for name in NAMES)


def test_both_clients_have_the_same_methods_and_arguments() -> None:
    assert public(sdk.Client) == METHODS
    assert public(sdk.AsyncClient) == METHODS
    assert list(inspect.signature(sdk.Client.__init__).parameters) == INIT
    assert list(inspect.signature(sdk.AsyncClient.__init__).parameters) == INIT


def test_the_options_are_these_and_documented() -> None:
    assert list(sdk.GenerateOptions.__annotations__) == OPTIONS
    assert all(f"{name}: " in (sdk.GenerateOptions.__doc__ or "") for name in OPTIONS)


def test_every_public_name_is_documented() -> None:
    assert all(inspect.getdoc(getattr(sdk, name)) for name in NAMES)
