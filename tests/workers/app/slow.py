"""Tools that take their time, each in its own way, and tell Redis what befell them."""

import asyncio
import ctypes
import os
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import redis
from celery.exceptions import SoftTimeLimitExceeded
from django.conf import settings

from agents_project.demo.models import Ledger
from runs import Agent
from tools import RetryPolicy, ToolContext, WorkerLeaving, tool

LOOK_SECONDS = 0.02


def tell(ctx: ToolContext, what: str) -> None:
    """Say it outside of any transaction, with the time."""
    redis.Redis.from_url(settings.REDIS_URL).rpush(f"{what}:{ctx.tool_call.id}", time.time())


def _begin(ctx: ToolContext, seconds: float) -> None:
    """Tell of the start, then take the time; a later attempt takes none."""
    tell(ctx, "started")
    try:
        time.sleep(seconds if ctx.attempt == 1 else 0)
    except SoftTimeLimitExceeded:
        tell(ctx, "cleaned")
        raise


@tool(timeout_seconds=1)
def limited(seconds: float, ctx: ToolContext) -> str:
    """Work for longer than it may."""
    _begin(ctx, seconds)
    return "done"


@tool(timeout_seconds=1)
async def limited_async(seconds: float, ctx: ToolContext) -> str:
    """Wait for longer than it may."""
    tell(ctx, "started")
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        tell(ctx, "cleaned")
        raise
    return "done"


@tool(timeout_seconds=60)
def unlimited(seconds: float, ctx: ToolContext) -> str:
    """Work."""
    _begin(ctx, seconds)
    return "done"


def _heed_nothing(ctx: ToolContext, seconds: float) -> str:
    tell(ctx, "started")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            time.sleep(until - time.monotonic())
        except Exception:
            tell(ctx, "unheeded")
    tell(ctx, "ended")
    return "done"


@tool(timeout_seconds=1, idempotent=False)
def stubborn(seconds: float, ctx: ToolContext) -> str:
    """Heed no limit."""
    return _heed_nothing(ctx, seconds)


@tool(timeout_seconds=60)
def deaf(seconds: float, ctx: ToolContext) -> str:
    """Heed no cancel."""
    return _heed_nothing(ctx, seconds)


@tool(timeout_seconds=60)
def gripping(seconds: float, ctx: ToolContext) -> str:
    """Keep the interpreter to itself: no other thread of the process does anything meanwhile."""
    tell(ctx, "started")
    ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))
    return "done"


@tool(timeout_seconds=60)
def spawning(seconds: float, ctx: ToolContext) -> str:
    """Let other processes work."""
    tell(ctx, "started")
    if (forked := os.fork()) == 0:  # as multiprocessing does it
        time.sleep(seconds)
        os._exit(0)
    subprocess.run([sys.executable, "-c", f"import time; time.sleep({seconds})"], check=True)
    return f"done ({os.waitpid(forked, 0)[1]})"


@tool(timeout_seconds=900)
def long(seconds: float, ctx: ToolContext) -> str:
    """Work, say how far it is, and listen."""
    tell(ctx, "started")
    begun = time.monotonic()
    while (passed := time.monotonic() - begun) < seconds:
        if ctx.is_cancelled():
            tell(ctx, "heard")
            return "cancelled"
        ctx.progress(passed / seconds, f"{passed:.1f} s of {seconds}")
        time.sleep(LOOK_SECONDS)
    return "done"


@tool(timeout_seconds=60)
def talkative(seconds: float, ctx: ToolContext) -> str:
    """Talk on when nobody listens any more."""
    tell(ctx, "started")
    until = time.monotonic() + seconds
    while not ctx.is_cancelled() and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
    ctx.progress(1.0, "late")
    ctx.emit({"late": True})
    tell(ctx, "talked")
    return "late"


@tool(atomic=True, timeout_seconds=60)
def writing(seconds: float, ctx: ToolContext) -> str:
    """Write when nobody wants it any more."""
    tell(ctx, "started")
    Ledger.objects.create(call_id=ctx.tool_call.id, number=ctx.attempt)
    until = time.monotonic() + seconds
    while not ctx.is_cancelled() and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
    tell(ctx, "talked")
    return "late"


@tool(timeout_seconds=900, on_deploy="give_back", idempotent=True)
def given_back(seconds: float, ctx: ToolContext) -> str:
    """Work; a deploy interrupts it."""
    _begin(ctx, seconds)
    return "done"


@tool(timeout_seconds=900)
def stopping(seconds: float, ctx: ToolContext) -> str:
    """Work; end it when the worker leaves."""
    tell(ctx, "started")
    until = time.monotonic() + (seconds if ctx.attempt == 1 else 0)
    while time.monotonic() < until:
        if ctx.stopping:
            tell(ctx, "cleaned")
            raise WorkerLeaving
        time.sleep(LOOK_SECONDS)
    return "done"


class Busy(Exception):
    """Somebody else's service says when it will answer."""

    def __init__(self, seconds: float) -> None:
        super().__init__("Authorization: Bearer sk-secret-of-the-service")
        self.retry_after = timedelta(seconds=seconds)


@tool(retry=RetryPolicy(attempts=2))
def busy(seconds: float, ctx: ToolContext) -> str:
    """Ask a service that is busy."""
    tell(ctx, "started")
    if ctx.attempt == 1:
        raise Busy(seconds)
    return "done"


TOOLS: list[Any] = [
    *(limited, limited_async, unlimited, stubborn, deaf, gripping, spawning, long, talkative, writing, given_back),
    *(stopping, busy),
]
slow_test = Agent(name="slow_test", model="openai:test", instructions="Do as told.", tools=TOOLS)
