"""The client that blocks. What it does, and when, is said by `calls`, `following` and `connection`; this sends and waits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self, TypeVar, Unpack

import httpx2

from longhaul_client import calls
from longhaul_client.answers import (
    CallStatus,
    Event,
    Events,
    Message,
    Messages,
    MessageStatus,
    NewMessage,
    Page,
    Run,
    RunStatus,
    Thread,
    ToolCall,
)
from longhaul_client.backoff import Backoff
from longhaul_client.calls import Call, Content, ForkOptions, NewThread, StartOptions, ThreadChange
from longhaul_client.connection import LOST, UNBOUNDED, Settings, Tries, read
from longhaul_client.following import Following, Patience, place
from longhaul_client.transcript import Transcript

Answer = TypeVar("Answer")
Item = TypeVar("Item")


class Longhaul:
    """A client of one server.

        with Longhaul("https://agents.example.com", api_key="lh_...") as client:
            run = client.runs.start("support", "Where is order 1042?")
            for event in client.stream(run):
                ...

    `base_url` and `api_key` default to LONGHAUL_URL and LONGHAUL_API_KEY. `http` is an httpx2 client of your own, which stays
    open; without a key it signs in as that does. All times are in seconds: `timeout` for a connection and for an answer to
    begin, `stall` for a stream without a byte, `give_up_after` for a stream that cannot be had (None: never). `retries` are of a
    call that is no stream; one that creates something carries an Idempotency-Key, so it happens once.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        http: httpx2.Client | None = None,
        timeout: float = 20.0,
        stall: float = 40.0,
        retries: int = 4,
        give_up_after: float | None = 300.0,
        backoff: Backoff | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = Settings.of(
            base_url, api_key, timeout=timeout, stall=stall, retries=retries, give_up_after=give_up_after,
            backoff=backoff, headers=headers,
        )  # fmt: skip
        self._own = http is None
        self._http = http if http is not None else httpx2.Client(limits=UNBOUNDED)
        self.runs = Runs(self)
        self.threads = Threads(self)
        self.messages = MessagesOf(self)
        self.tool_calls = ToolCalls(self)

    def __repr__(self) -> str:
        return f"Longhaul({self._settings.where!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, but those of an `http` that was given."""
        if self._own:
            self._http.close()

    def stream(
        self,
        run: Run | str,
        *,
        after: int | str | Event | None = None,
        give_up_after: Patience = False,
    ) -> Stream:
        """Follow a run: its events after the cursor, then live ones, to its last, over all cuts."""
        return Stream(self, self._following(give_up_after, run=calls.id_of(run), seq=place(after)[1]))

    def conversation(self, thread: Thread | str, *, last: int = 100) -> Conversation:
        """Follow a thread as an interface shows it: its last messages, then each change of them."""
        return Conversation(self, thread, last)

    def alive(self) -> dict[str, Any]:
        """Ask whether the server answers at all."""
        return self._do(calls.health("/healthz"))

    def ready(self) -> dict[str, Any]:
        """Ask whether runs can move. Raises ServerError, whose text says what is missing."""
        return self._do(calls.health("/readyz"))

    def _following(self, give_up_after: Patience, **of: Any) -> Following:
        patience = self._settings.give_up_after if give_up_after is False else give_up_after
        return Following(**of, backoff=self._settings.backoff, give_up_after=patience)

    def _do(self, call: Call[Answer]) -> Answer:
        tries = Tries(call, self._settings)
        while True:
            try:
                response = self._http.send(self._settings.request(self._http, call), auth=self._settings.credentials)
            except LOST as error:
                pause = tries.lost(error)
            else:
                again = tries.answered(response)
                if again is None:
                    return read(call, response)
                pause = again
            time.sleep(pause)


class Stream:
    """Events, over as many connections as it takes. Iterate it; leave it, and iterate it again to go on.

    `cursor` is where a stream goes on behind the last event that you were given: keep it, and give it as `after`. `connections`
    counts. A stream that you leave by `break` closes its connection; so does `close`, and the end of a `with` block.
    """

    def __init__(self, client: Longhaul, following: Following) -> None:
        self._client, self._following = client, following
        self._response: httpx2.Response | None = None
        self._pieces: Iterator[bytes] = iter(())
        self._ready: deque[Event] = deque()
        self.cursor = following.cursor
        self._reader: object = None  # the loop over it that reads; another may be ended later, by the garbage collector

    def __repr__(self) -> str:
        return f"<Stream {self._following!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        self._reader = reader = object()
        try:
            while self._fill():
                while self._ready:
                    yield self._take()
        finally:
            if self._reader is reader:
                self.close()

    def batches(self) -> Iterator[list[Event]]:
        """Iterate the events that came together. For who redraws: once a batch is enough."""
        self._reader = reader = object()
        try:
            while self._fill():
                yield [self._take() for _ in range(len(self._ready))]
        finally:
            if self._reader is reader:
                self.close()

    def text(self) -> Iterator[str]:
        """Iterate the text as it is spoken.

        What was said before a worker died is said again, in other words: an interface that can take back uses a Transcript.
        """
        for event in self:
            if event.type == "text.delta":
                yield event["text"]

    def finish(self) -> Run:
        """Read to the end; return the run as it is then."""
        for _ in self:
            pass
        return self._client.runs.get(self.run_id())

    def run_id(self) -> str:
        """The run's id. When it is being started, this waits until it is; of a thread's stream, the run that it stands at."""
        while self._following.run is None and not self._following.over and self._following.thread is None:
            if self._response is None:
                self._open()
            elif not self._ready:
                self._fill()
        return self._following.run or ""

    @property
    def connections(self) -> int:
        return self._following.connections

    def close(self) -> None:
        """Close the connection. The run goes on, and so may this stream: iterate it again."""
        response, self._response = self._response, None
        self._pieces = iter(())
        if response is not None:
            response.close()

    def _take(self) -> Event:
        event = self._ready.popleft()
        self.cursor = event.id
        return event

    def _fill(self) -> bool:
        """Read until there is an event. Return False at the end."""
        while not self._ready:
            if self._following.over:
                return False
            if self._response is None:
                self._open()
                continue
            error: Exception | None = None
            try:
                piece = next(self._pieces, None)
            except LOST as lost:
                piece, error = None, lost
            if piece is not None:
                self._ready.extend(self._following.take(piece))
                error = self._following.fault
            if piece is None or error is not None:
                self._again(error)
        return True

    def _open(self) -> None:
        """Begin a connection, or fail to and wait. Raises ApiError, ConnectionLost, StreamBroken."""
        settings, http = self._client._settings, self._client._http
        try:
            request = settings.stream(http, self._following.ask())
            response = http.send(request, auth=settings.credentials, stream=True)
            if self._following.answered(response.status_code, response.headers):
                self._response, self._pieces = response, response.iter_bytes()
                return
            try:
                body = response.read()
            finally:
                response.close()
        except LOST as error:
            self._again(error)
            return
        if not self._following.over:
            self._again(self._following.refused(response.status_code, response.headers, body))

    def _again(self, error: Exception | None) -> None:
        self.close()
        pause = self._following.lost(error)
        if not self._ready:
            time.sleep(pause)


class Conversation:
    """A thread as it is, and as it becomes: iterate it, and be given the Transcript after each change.

    It is always the same one, as it is now: a slow reader skips states, and no text. It has no end: leave it when
    `not transcript.is_running`, or when you like. Where events were removed that it has not seen, it loads the thread anew.
    """

    def __init__(self, client: Longhaul, thread: Thread | str, last: int) -> None:
        self._client, self._thread, self._last = client, thread, last
        self.transcript = Transcript()

    def __iter__(self) -> Iterator[Transcript]:
        while True:
            self.transcript = self._snapshot()
            yield self.transcript
            with self._client.threads.stream(self._thread, after=self.transcript.cursor) as stream:
                for events in stream.batches():
                    self.transcript.take_all(events)
                    if self.transcript.gap:
                        break
                    yield self.transcript

    def send(self, input: Content, agent: str | None = None, **options: Unpack[StartOptions]) -> Run:
        """Start a run on the thread."""
        return self._client.runs.start(agent, input, thread=self._thread, **options)

    def _snapshot(self) -> Transcript:
        page = self._client.threads.messages(self._thread, order="desc", limit=self._last)
        run = None if page.run is None else self._client.runs.get(page.run)
        return Transcript(page.upright(), run=run)


class Runs:
    def __init__(self, client: Longhaul) -> None:
        self._client = client

    def start(
        self,
        agent: str | None = None,
        input: Content | None = None,
        *,
        thread: Thread | str | None = None,
        **options: Unpack[StartOptions],
    ) -> Run:
        """Start a run in the background: on a new thread, or on this one, whose agent is the default.

        Without `input` and `message` it goes on from the thread's last state.
        """
        return self._client._do(calls.start(agent, input, thread, options))

    def start_and_stream(
        self,
        agent: str | None = None,
        input: Content | None = None,
        *,
        thread: Thread | str | None = None,
        give_up_after: Patience = False,
        **options: Unpack[StartOptions],
    ) -> Stream:
        """Start a run and follow it, in one request. It starts when you iterate, or ask for `run_id()`; one, however it is cut."""
        call = calls.start(agent, input, thread, options, stream=True)
        return Stream(self._client, self._client._following(give_up_after, start=call))

    def stream(self, run: Run | str, *, after: int | str | Event | None = None) -> Stream:
        """The same as `client.stream`."""
        return self._client.stream(run, after=after)

    def get(self, run: Run | str) -> Run:
        return self._client._do(calls.get_run(run))

    def list(
        self,
        *,
        active: bool | None = None,
        agent: str | Iterable[str] | None = None,
        status: RunStatus | Iterable[RunStatus] | None = None,
        thread: Thread | str | None = None,
        metadata: Mapping[str, str] | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Page[Run]:
        """List runs, the newest first. `active=True` finds what goes on, after a restart of your own."""
        return self._client._do(calls.list_runs(active, agent, status, thread, metadata, limit, cursor))

    def wait(
        self,
        run: Run | str,
        *,
        timeout: float | None = None,
        until: Literal["finished", "requires_action"] = "finished",
    ) -> Run:
        """Wait until the run has ended (or wants a person); after `timeout` seconds return it as it is then."""
        waiting = calls.Waiting(run, timeout, until)
        while (call := waiting.next()) is not None:
            waiting.told(self._client._do(call))
        return waiting.run

    def cancel(self, run: Run | str, *, reason: str | None = None) -> Run:
        """Cancel a run, at once and for good. One that has ended is returned as it is."""
        return self._client._do(calls.cancel_run(run, reason))

    def resume(self, run: Run | str, input: Content | None = None, *, idempotency_key: str | None = None) -> Run:
        """Start a new run where a cancelled or failed one ended, on the same thread."""
        return self._client._do(calls.resume_run(run, input, idempotency_key))

    def retry(self, run: Run | str, *, idempotency_key: str | None = None) -> Run:
        """Start a new run that does the last step of this one again, on the same thread."""
        return self._client._do(calls.retry_run(run, idempotency_key))

    def fork(self, run: Run | str, *, after_step: int | None = None, **options: Unpack[ForkOptions]) -> Run:
        """Copy the thread up to a step of the run, and start a new run there."""
        return self._client._do(calls.fork_run(run, after_step, options))

    def events(self, run: Run | str, *, after: int = 0, limit: int | None = None) -> Events:
        """Read what stands in the log, without following it."""
        return self._client._do(calls.list_events(run, after, limit))

    def messages(self, run: Run | str, *, limit: int | None = None, cursor: str | None = None) -> Page[Message]:
        """List what the run was given and what it said, also what its thread does not show."""
        return self._client._do(calls.list_run_messages(run, limit, cursor))


class Threads:
    def __init__(self, client: Longhaul) -> None:
        self._client = client

    def create(self, **options: Unpack[NewThread]) -> Thread:
        return self._client._do(calls.create_thread(options))

    def get(self, thread: Thread | str) -> Thread:
        return self._client._do(calls.get_thread(thread))

    def list(
        self,
        *,
        agent: str | Iterable[str] | None = None,
        archived: bool | None = None,
        order: Literal["asc", "desc"] | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Page[Thread]:
        """List threads, the newest first."""
        return self._client._do(calls.list_threads(agent, archived, order, limit, cursor))

    def update(self, thread: Thread | str, **change: Unpack[ThreadChange]) -> Thread:
        """Change a thread. What is left out stays as it is; None takes an override away."""
        return self._client._do(calls.update_thread(thread, change))

    def delete(self, thread: Thread | str) -> None:
        """Delete a thread with all that hangs on it. Its live runs are cancelled first."""
        self._client._do(calls.delete_thread(thread))

    def messages(
        self,
        thread: Thread | str,
        *,
        status: MessageStatus | Iterable[MessageStatus] | None = None,
        kind: Literal["text", "tool"] | None = None,
        after: Message | str | None = None,
        order: Literal["asc", "desc"] | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Messages:
        """List messages as they stand in the thread. Stream from the list's `cursor`: no character is missed, none comes twice."""
        return self._client._do(calls.list_messages(thread, status, kind, after, order, limit, cursor))

    def save(
        self, thread: Thread | str, *messages: NewMessage, idempotency_key: str | None = None
    ) -> Sequence[Message]:
        """Save messages, all or none, and run nothing."""
        return self._client._do(calls.save_messages(thread, messages, idempotency_key))

    def stream(
        self,
        thread: Thread | str,
        *,
        after: str | Event | None = None,
        give_up_after: Patience = False,
    ) -> Stream:
        """Follow a thread: its runs one after another, and those to come. `after` is `RUN:SEQ`. It has no end."""
        run, seq = place(after)
        return Stream(
            self._client, self._client._following(give_up_after, thread=calls.id_of(thread), run=run, seq=seq)
        )


class MessagesOf:
    def __init__(self, client: Longhaul) -> None:
        self._client = client

    def delete(self, message: Message | str) -> None:
        """Delete a message: no tool call or result, and not while a run occupies its thread."""
        self._client._do(calls.delete_message(message))


class ToolCalls:
    def __init__(self, client: Longhaul) -> None:
        self._client = client

    def get(self, call: ToolCall | str) -> ToolCall:
        return self._client._do(calls.get_tool_call(call))

    def list(
        self,
        *,
        run: Run | str | None = None,
        status: CallStatus | Iterable[CallStatus] | None = None,
        name: str | Iterable[str] | None = None,
        needs: Literal["approval", "result", "decision"] | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Page[ToolCall]:
        """List tool calls, the newest first; `needs` picks those that wait for a person."""
        return self._client._do(calls.list_tool_calls(run, status, name, needs, limit, cursor))
