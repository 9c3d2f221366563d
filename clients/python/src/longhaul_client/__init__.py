"""A client of a Longhaul server, which misses nothing of a stream.

    from longhaul_client import Longhaul

    with Longhaul("https://agents.example.com", api_key="lh_...") as client:
        run = client.runs.start("support", "Where is order 1042?")
        for text in client.stream(run).text():
            print(text, end="")

`AsyncLonghaul` is the same with `await` and `async for`. The modules: `frames` (bytes to frames), `following` (one stream over many
connections), `transcript` (the fold), `calls` and `answers` (requests and what comes back), `backoff` and `errors` know no
connection; `sync` and `aio` are the two that have one.
"""

from longhaul_client.aio import AsyncConversation, AsyncLonghaul, AsyncStream
from longhaul_client.answers import Event, Events, Message, Messages, NewMessage, Page, Part, Run, Thread, ToolCall
from longhaul_client.backoff import Backoff
from longhaul_client.errors import (
    ApiError,
    BadRequest,
    Conflict,
    ConnectionLost,
    Forbidden,
    LonghaulError,
    NotFound,
    ServerError,
    StreamBroken,
    TooManyRequests,
    Unauthorized,
)
from longhaul_client.sync import Conversation, Longhaul, Stream
from longhaul_client.transcript import CallState, Transcript, fold

__all__ = [
    "ApiError",
    "AsyncConversation",
    "AsyncLonghaul",
    "AsyncStream",
    "Backoff",
    "BadRequest",
    "CallState",
    "Conflict",
    "ConnectionLost",
    "Conversation",
    "Event",
    "Events",
    "Forbidden",
    "Longhaul",
    "LonghaulError",
    "Message",
    "Messages",
    "NewMessage",
    "NotFound",
    "Page",
    "Part",
    "Run",
    "ServerError",
    "Stream",
    "StreamBroken",
    "Thread",
    "TooManyRequests",
    "ToolCall",
    "Transcript",
    "Unauthorized",
    "fold",
]
