"""Questions to code of the host's, which may hang: each in a thread of its own, a few at a time.

Neither in asgiref's one thread, where everybody would stand behind one who hangs, nor in a pool's, which a process waits for
before it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from runs.streams import replies
from threads.database import release

logger = logging.getLogger("longhaul.streams")

AT_ONCE = 4
ANSWER_SECONDS = 5.0  # then a question hangs, and makes room for others
MOST_HANGING = 50  # then nobody is asked anything: the next would hang as well

R = TypeVar("R")


class Questions:
    """Asks in threads, for one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._open: dict[Hashable, asyncio.Future[None]] = {}  # by their subjects those whose thread still runs

    async def ask(self, subject: Hashable, question: Callable[[], R]) -> R | None:
        """Return the answer; None when there is none in time, or the last question of this subject hangs still.

        Raises what the question raises.
        """
        until = self._loop.time() + ANSWER_SECONDS
        while True:
            async with self._turn:
                before = self._open.get(subject)
                if before is None:
                    return None if len(self._open) >= MOST_HANGING else await self._ask(subject, question)
            # One thread for a subject: this comes behind the one that is under way, which is answered soon, or hangs.
            left = until - self._loop.time()
            if left <= 0:
                return None
            await asyncio.wait([before], timeout=left)

    async def _ask(self, subject: Hashable, question: Callable[[], R]) -> R | None:
        answer: asyncio.Future[R] = self._loop.create_future()
        thread = threading.Thread(
            target=self._run, args=(subject, question, answer), name="longhaul-streams-question", daemon=True
        )
        self._open[subject] = self._loop.create_future()
        try:
            thread.start()
        except RuntimeError as error:
            self._over(subject)
            logger.warning("The access policy cannot be asked: %s", error)  # there are too many threads
            return None
        try:
            done, _ = await asyncio.wait([answer], timeout=ANSWER_SECONDS)
        finally:
            if not answer.done():
                answer.cancel()
        if done:
            return answer.result()
        logger.warning("The access policy has not answered in %g s", ANSWER_SECONDS)
        return None

    def _run(self, subject: Hashable, question: Callable[[], Any], answer: asyncio.Future[Any]) -> None:
        found, error = replies.tried(question)
        with contextlib.suppress(Exception):  # whatever it is, the question was answered
            release()
        try:
            self._loop.call_soon_threadsafe(self._answered, subject, answer, found, error)
        except RuntimeError:
            pass  # the loop was closed

    def _over(self, subject: Hashable) -> None:
        self._open.pop(subject).set_result(None)

    def _answered(self, subject: Hashable, answer: asyncio.Future[Any], found: Any, error: Exception | None) -> None:
        self._over(subject)
        replies.fill(answer, found, error)
