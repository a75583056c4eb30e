"""Python SDK over gRPC: :class:`Client` and :class:`AsyncClient`. May import ``protocol`` and ``core``.

>>> from prismserve.client import Client
>>> with Client("127.0.0.1:9000") as client:  # doctest: +SKIP
...     print(client.generate("What colour is the circle?", images=["scene.png"]).text)
"""

from prismserve.client.aio import AsyncClient
from prismserve.client.client import Client
from prismserve.client.content import Image, Message, Video
from prismserve.client.errors import (
    AuthenticationError,
    BadRequestError,
    CancelledError,
    ClientClosedError,
    ClientError,
    IncompleteAnswerError,
    InternalServerError,
    NotFoundError,
    OverloadedError,
    RequestError,
    TimeoutExceededError,
    UnavailableError,
    UnsupportedError,
)
from prismserve.client.requests import GenerateOptions
from prismserve.client.responses import Answer, Choice, ClusterStatus, Delta, Model, TokenLogprob, Usage, WorkerStatus
from prismserve.client.retry import RetryPolicy

__all__ = [
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
