"""One flusher a worker process gathers the deltas of all its runs and commits them together (group commit).

A leg adds chunks to its Buffer; every few tens of milliseconds the flusher writes all of them by one function call. A leg's
step commit takes what is left, after the batch in flight was answered, so that no delta follows the end of its message.
After a COMMIT whose answer was lost nothing is assumed: the batch is sent again as it was, and the run's row knows
which ordinals it has. (A read-back would not do: a server may still be at work on what a cut connection sent.)
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.db import InterfaceError, OperationalError, connection

from runs import bells
from runs.claims import Claim
from threads import database

logger = logging.getLogger("longhaul.flusher")

AGAIN_SECONDS = 0.2  # between tries while Postgres does not answer


@dataclass(slots=True)
class Chunk:
    """A delta that is not yet a row. `ordinal` is that of its last piece; pieces of one kind in a row are joined.

    What was `sent` once stays as it is: it may be a row.
    """

    type: str
    ordinal: int
    payload: dict[str, Any]
    sent: bool = False


@dataclass
class Buffer:
    """The unwritten deltas of one message."""

    claim: Claim
    epoch: int
    message: UUID
    chunks: list[Chunk] = field(default_factory=list)
    in_flight: list[Chunk] = field(default_factory=list)
    answered: threading.Event = field(default_factory=threading.Event)
    ordinal: int = 0
    since: float = 0.0  # when the oldest unwritten chunk came, monotonic
    begun: bool = False  # some of it was sent: what comes now is of a message that goes on
    lock: threading.Lock = field(default_factory=threading.Lock)  # leg and flusher are two threads where not greenlets

    def add(self, type: str, text: str, **fields: Any) -> None:
        with self.lock:
            self._add(type, text, fields)

    def _add(self, type: str, text: str, fields: dict[str, Any]) -> None:
        self.ordinal += 1
        last = self.chunks[-1] if self.chunks and not self.chunks[-1].sent else None
        if last is not None and last.type == type and all(last.payload[key] == value for key, value in fields.items()):
            last.payload["text"] += text
            last.ordinal = self.ordinal
        else:
            if not self.chunks:
                self.since = time.monotonic()
            self.chunks.append(Chunk(type, self.ordinal, {"message": str(self.message), "text": text, **fields}))

    def take(self) -> list[Chunk]:
        """Return what the step's commit must write itself. Waits for the batch in flight."""
        while True:
            with self.lock:  # seen and taken in one: the flusher may be another thread
                if not self.in_flight:
                    chunks, self.chunks = self.chunks, []
                    return chunks
            self.answered.wait(1.0)
            self.claim.check_lost()

    def send(self) -> bool:
        """Move the chunks into the batch in flight. False: there are none, the step has taken them meanwhile."""
        with self.lock:
            if not self.chunks:
                return False
            self.in_flight, self.chunks = self.chunks, []
            self.begun = True
            for chunk in self.in_flight:
                chunk.sent = True
            self.answered.clear()
            return True

    def settle(self, *, again: bool) -> None:
        """The batch in flight is answered, or never will be: with `again` its chunks are for the next one."""
        with self.lock:
            if again:
                self.chunks[:0] = self.in_flight
            self.in_flight = []
            self.answered.set()


class Flusher:
    """Writes the buffers of this process, and rings for its commits in the same rhythm."""

    def __init__(self, interval: timedelta) -> None:
        self._interval = interval.total_seconds()
        self._buffers: dict[tuple[UUID, int], Buffer] = {}
        self._rung: set[str] = set()
        self._work = threading.Event()
        self._ended = False
        self._due = math.inf  # when the round that was begun should be over, monotonic
        self._thread = threading.Thread(target=self._keep, name="longhaul-flusher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended = True
        self._work.set()

    def open(self, claim: Claim, message: UUID) -> Buffer:
        buffer = Buffer(claim, claim.epoch, message)
        self._buffers[claim.key] = buffer
        return buffer

    def close(self, buffer: Buffer) -> None:
        """The message has ended, or its leg was lost: drop what was not written."""
        self._buffers.pop((buffer.claim.run_id, buffer.epoch), None)

    def wake(self) -> None:
        self._work.set()

    @property
    def is_late(self) -> bool:
        """Whether a round takes longer than it should: legs that read on without a pause leave it no time."""
        return time.monotonic() > self._due

    def ring(self, run_id: UUID) -> None:
        """Ring for a commit with the next batch: many in one round trip."""
        self._rung.add(bells.run_channel(run_id))
        self._work.set()

    def _keep(self) -> None:
        while not self._ended:
            self._work.wait()
            self._work.clear()
            self._due = time.monotonic() + 2 * self._interval
            time.sleep(self._interval)
            try:
                self.flush(older_than=self._interval * 0.9)
            except Exception:
                logger.exception("The flusher goes on after an error")
                connection.close()
            self._due = math.inf

    def flush(self, older_than: float = 0.0) -> None:
        """Write what has been buffered, in one transaction, then ring.

        A message that has only just begun, less than `older_than` seconds ago, waits a round: a step that ends meanwhile writes it
        with its commit, at no cost. One that goes on does not wait: it would be late by a round each time.
        """
        waiting = [buffer for buffer in list(self._buffers.values()) if buffer.chunks and not buffer.in_flight]
        due = time.monotonic() - older_than
        batch = [buffer for buffer in waiting if buffer.begun or buffer.since <= due]
        if len(batch) < len(waiting):
            self._work.set()
        batch = [buffer for buffer in batch if buffer.send()]
        for worker in {buffer.claim.worker for buffer in batch}:  # one, but for a process that began a new life
            self._write([buffer for buffer in batch if buffer.claim.worker == worker])
        if batch:
            database.release()
        rung, self._rung = self._rung, set()
        if rung:
            bells.ring(rung)

    def _write(self, batch: list[Buffer]) -> None:
        try:
            states = _write_rows(batch)
        except (OperationalError, InterfaceError) as error:
            logger.warning("A batch of deltas was not answered, it is sent again: %s", type(error).__name__)
            connection.close()
            time.sleep(AGAIN_SECONDS)
            for buffer in batch:
                buffer.settle(again=True)
            self._work.set()
            return
        except Exception:  # Postgres refuses a value, or it is no JSON
            if len(batch) > 1:  # one bad delta must not fail the others: run by run
                for buffer in batch:
                    self._write([buffer])
            else:
                logger.exception("A delta of run %s cannot be stored", batch[0].claim.run_id)
                batch[0].claim.interrupt("lost")
                batch[0].settle(again=False)
            return
        for buffer in batch:
            self._answer(buffer, states.get((buffer.claim.run_id, buffer.epoch), "lost"))

    def _answer(self, buffer: Buffer, state: str) -> None:
        if state == "busy":  # somebody holds the run: the next round
            self._work.set()
        elif state == "lost":
            buffer.claim.interrupt("lost")
        else:
            self._rung.add(bells.run_channel(buffer.claim.run_id))
        buffer.settle(again=state == "busy")


def _write_rows(batch: list[Buffer]) -> dict[tuple[UUID, int], str]:
    rows = [
        (buffer.claim.run_id, buffer.epoch, buffer.message, chunk.type, chunk.ordinal, database.dumps(chunk.payload))
        for buffer in batch
        for chunk in buffer.in_flight
    ]
    runs, epochs, messages, types, ordinals, payloads = (list(column) for column in zip(*rows, strict=True))
    # The columns go in binary: written out as the text of an array, a row of JSON costs more than all else here (8 us of 12,
    # against 0.3), for each quote in it is escaped, and Postgres takes that off again.
    answers = database.rows_of(
        "SELECT run_id, epoch, state FROM longhaul_deltas_write("
        "%s::uuid, %b::uuid[], %b::int[], %b::uuid[], %b::text[], %b::int[], %b::jsonb[])",
        (batch[0].claim.worker, runs, epochs, messages, types, ordinals, payloads),
    )
    return {(run, epoch): state for run, epoch, state in answers}
