"""A model that says what a test gives it, in the place of every model service."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest import mock

import orjson

if TYPE_CHECKING:
    from runs.providers.port import ModelEvent, ModelRequest, ProviderError, ReasoningDelta, ToolSpec, UsageReported


@dataclass(frozen=True)
class CallTool:
    """A call in a scripted answer. `arguments` is an object, or a text that need not be JSON."""

    name: str
    arguments: Mapping[str, Any] | str

    @property
    def text(self) -> str:
        """The arguments as the model would write them."""
        given = self.arguments
        return given if isinstance(given, str) else orjson.dumps(given, default=str).decode()


def call(name: str, /, **arguments: Any) -> CallTool:
    """Let the model call a tool."""
    return CallTool(name, arguments)


Part: TypeAlias = "str | CallTool | ReasoningDelta | UsageReported | ProviderError"
Reply: TypeAlias = "Part | Sequence[Part]"


@dataclass
class ScriptedModel:
    """Stands in for every model service. It says the replies in order, one a call, and records what it was asked.

    A reply is a text, a call, a ProviderError to raise, or a list of them: several calls are parallel ones, and an error
    at the end cuts off what was said before it. In a list may also stand `UsageReported` (what the call cost; else 1
    token a message and 1 for the answer) and `ReasoningDelta`. `answer` may be set to a function of the request's
    messages instead, which returns a reply.
    """

    name: str = "scripted"
    replies: list[Reply] = field(default_factory=list)
    answer: Callable[[list[dict[str, Any]]], Reply] | None = None
    requests: list[ModelRequest] = field(default_factory=list)

    def say(self, *replies: Reply) -> None:
        """Give it more replies. Raises TypeError for what is none, ValueError for one that says nothing."""
        for reply in replies:
            parts_of(reply)
        self.replies.extend(replies)

    def shown(self, number: int = -1) -> list[dict[str, Any]]:
        """Return the messages that a model call was shown, the last call's if no number (from 0) is given.

        Each is `{"role", "content": [parts]}`; a part is `{"type": "text", "text"}`, or a `tool_call` or `tool_result`.
        Raises AssertionError when there was no such call.
        """
        try:
            request = self.requests[number]
        except IndexError:
            raise AssertionError(f"The scripted model was asked {len(self.requests)} times, not more.") from None
        return [orjson.loads(message) for message in request.messages]

    # -- the provider port --

    def render(self, message: Mapping[str, Any]) -> bytes:
        return orjson.dumps(message)

    def render_tools(self, tools: Sequence[ToolSpec]) -> bytes:
        return orjson.dumps([tool.name for tool in tools]) if tools else b""

    def warm(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing is open."""

    def stream(self, request: ModelRequest) -> Iterator[ModelEvent]:
        from runs.providers.port import Finished, ProviderError, TextDelta, ToolCallDelta, UsageReported

        self.requests.append(request)
        if self.answer is not None:
            reply = self.answer([orjson.loads(message) for message in request.messages])
        elif self.replies:
            reply = self.replies.pop(0)
        else:
            raise AssertionError(
                "The scripted model was asked once more than it has replies. Give it more by say()."
                f" It was shown last: {self.shown()[-1:]}"
            )
        index = 0
        usage = UsageReported(input_tokens=len(request.messages), output_tokens=1)
        for part in parts_of(reply):
            if isinstance(part, ProviderError):
                raise part
            if isinstance(part, UsageReported):
                usage = part
            elif isinstance(part, CallTool):
                yield ToolCallDelta(index, f"call_{index}", part.name, part.text)
                index += 1
            elif isinstance(part, str):
                yield TextDelta(part)
            else:
                yield part
        yield usage
        yield Finished("tool_calls" if index else "stop")


def parts_of(reply: Reply) -> list[Part]:
    """Return the parts of a reply. Raises TypeError for what is none, ValueError for one that says nothing."""
    from runs.providers.port import ProviderError, ReasoningDelta, UsageReported

    known = (str, CallTool, ProviderError, ReasoningDelta, UsageReported)
    several = isinstance(reply, Sequence) and not isinstance(reply, str | bytes)
    parts: list[Any] = list(reply) if several else [reply]  # type: ignore[arg-type]
    for part in parts:
        if not isinstance(part, known):
            raise TypeError(f"A reply is a text, call(...), a ProviderError, or a list of them; got {part!r}.")
    if not any(isinstance(part, CallTool | ProviderError) or (isinstance(part, str) and part) for part in parts):
        raise ValueError(
            f"The reply {reply!r} says nothing. What a service answers with nothing is ProviderError('server', ...)."
        )
    return [part for part in parts if part != ""]


@contextlib.contextmanager
def scripted(*replies: Reply) -> Iterator[ScriptedModel]:
    """Put a ScriptedModel in the place of every provider, for the block; an inner block's comes before an outer one's.

    Raises AssertionError at its end when replies are left that nobody asked for (`model.replies.clear()` if that is
    meant), unless the block itself raises.
    """
    from runs.providers import port

    model = ScriptedModel()
    model.say(*replies)
    prefixes = {*port._factories, "scripted"}
    with (
        mock.patch.dict(port._factories, {"scripted": lambda: model}),
        mock.patch.dict(port._providers, dict.fromkeys(prefixes, model)),
    ):
        yield model
    if model.replies:
        raise AssertionError(f"The model was never asked for {len(model.replies)} of its replies: {model.replies!r}")


@contextlib.contextmanager
def scripts_only() -> Iterator[None]:
    """Let no model service be asked: a test that forgot its script would spend money, or fail by the network."""
    from runs.providers import port

    def is_real(prefix: str) -> bool:
        provider = port._providers.get(prefix)
        home = port._factories[prefix] if provider is None else type(provider).__module__
        return isinstance(home, str) and home.startswith("runs.providers.")

    with mock.patch.dict(port._providers, {prefix: _NoScript() for prefix in port._factories if is_real(prefix)}):
        yield


class _NoScript(ScriptedModel):
    def stream(self, request: ModelRequest) -> Iterator[ModelEvent]:
        raise AssertionError(
            f"The run asks the model {request.model!r}, and no script is in place. Call run_to_end inside of"
            " `with scripted(...)`, or with the fixture scripted_model; real_model=True asks the service itself."
        )
