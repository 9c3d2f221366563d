"""What clients send. Shapes are checked here, meanings by the core: both answer 400 that names the field."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import ConfigDict, Discriminator, Field, RootModel, Tag
from typing_extensions import TypeAliasType

from runs.http.body import WHOLE, Given

PartType = Literal["text", "reasoning", "image", "file", "data"]
# Each list says `FIRST`: of a million wrong items one mistake is told, for each costs a hundred times the two bytes it takes.
FIRST = Field(fail_fast=True)
MOST_MESSAGES = 1000  # at once: a body holds half a million small ones, which would take a minute


def _left_out(schema: dict[str, Any]) -> None:
    """Let clients leave the field out, in place of sending a default."""
    del schema["default"]


class Part(Given):
    """One part of a message's content. Parts that are no text carry fields of their own."""

    model_config = Given.model_config | {
        "extra": "allow",
        "json_schema_extra": {
            "if": {"properties": {"type": {"enum": ["text", "reasoning"]}}},
            "then": {"required": ["text"]},
        },
    }
    type: PartType
    text: str = Field(default="", description="of a text or reasoning", json_schema_extra=_left_out)


Content = Annotated[str | Annotated[list[Part], FIRST], Field(description="a text, or a list of parts")]
Metadata = TypeAliasType("Metadata", Annotated[dict[str, Any], Field(description="yours: kept as it is")])
JSONSchema = TypeAliasType("JSONSchema", Annotated[dict[str, Any], Field(description="a JSON schema")])
Name = Annotated[str, Field(max_length=200)]


class Limits(Given):
    """What bounds a run. What is left out counts as the thread's, then the agent's, then the settings'."""

    max_steps: Annotated[int, Field(ge=1, le=1_000_000), WHOLE] | None = None
    max_total_tokens: Annotated[int, Field(ge=1, le=10**12), WHOLE] | None = None
    max_cost: Annotated[float | None, Field(gt=0, le=10**9)] = None
    deadline_seconds: Annotated[float | None, Field(gt=0, le=315_360_000)] = None
    leg_budget_seconds: Annotated[float | None, Field(gt=0, le=315_360_000)] = None


class Context(Given):
    """Which messages the model is shown."""

    last_messages: Annotated[int, Field(ge=1, le=10_000), WHOLE] | None = None


class NewMessage(Given):
    """A message that somebody says. Those of tools are written by runs only."""

    role: Literal["user", "system", "assistant"] = "user"
    content: Content
    metadata: Metadata | None = None
    client_id: Name | None = None


def _one_or_many(given: object) -> str:
    return "[many]" if isinstance(given, list) else "[one]"


One = Annotated[NewMessage, Tag("[one]")]
Many = Annotated[list[NewMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True), Tag("[many]")]


class NewMessages(RootModel[Annotated[One | Many, Discriminator(_one_or_many)]]):
    """One message, or a list of them. Which it is, is seen before: mistakes are told of that form only."""

    model_config = ConfigDict(strict=True)


class Overrides(Given):
    """What a thread or a run says itself, nearer than its agent. Lists replace, they do not merge."""

    model: Name | None = Field(default=None, description="`provider:name`")
    instructions: str | None = None
    tools: Annotated[list[Name], FIRST] | None = Field(default=None, description="names of the agent's tools")
    tool_choice: Name | None = Field(
        default=None,
        description="auto, none, required, or the name of a tool; the last two count for the first step of a run",
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="whether the model may ask for several calls at once; false: only the first is run"
    )
    limits: Limits | None = None
    context: Context | None = None


class ThreadFields(Overrides):
    agent: Name | None = Field(default=None, description="the agent of runs that name none")
    title: Annotated[str | None, Field(max_length=500)] = None
    summary: str | None = None
    metadata: Metadata | None = None


class NewThread(ThreadFields):
    """A thread, with messages if there are some already. Runs nothing."""

    messages: Annotated[list[NewMessage], Field(max_length=MOST_MESSAGES, fail_fast=True)] | None = None


class ThreadChange(ThreadFields):
    """What is left out stays as it is; null takes an override away."""

    archived: bool | None = None


class NewRun(Overrides):
    """A run. Without `input` and `message` it goes on from the thread's last state."""

    agent: Name | None = Field(default=None, description="defaults to the thread's")
    input: Content | None = None
    message: UUID | None = Field(default=None, description="a saved message of the thread, in place of an input")
    messages: Annotated[list[NewMessage], Field(max_length=MOST_MESSAGES, fail_fast=True)] | None = Field(
        default=None, description="shown to the model before the input"
    )
    save: Literal["prompt_and_output", "all", "none"] = Field(
        default="prompt_and_output", description="what later runs of the thread see of this one"
    )
    stream: bool = Field(default=False, description="answer with the run's events, as text/event-stream")
    busy: Literal["enqueue", "steer", "interrupt", "rollback", "reject"] = Field(
        default="enqueue",
        description="when a run occupies the thread: `enqueue` waits for its end; `steer` gives it the input, and the answer is"
        " that run; `interrupt` cancels it and starts; `rollback` does so and takes what it said out of the thread; `reject` is 409",
    )
    priority: Annotated[int, Field(ge=-32768, le=32767), WHOLE] = 0
    output_schema: JSONSchema | None = Field(default=None, description="a JSON schema of the final answer")
    metadata: Metadata | None = None
    client_id: Name | None = Field(default=None, description="comes back in the event of the saved input")


class FirstRun(NewRun):
    """A run on a new thread, which names no agent yet."""

    agent: Annotated[str, Field(min_length=1, max_length=200)]  # it has to be named


class Cancel(Given):
    reason: Annotated[str | None, Field(max_length=10_000)] = None


class CallResult(Given):
    """What an `unknown` call came to. Null is a result too."""

    result: Any


class CallError(Given):
    """That an `unknown` call failed. `retryable`: its effect is not there, and it may run again."""

    message: Annotated[str, Field(min_length=1, max_length=10_000, description="the model reads it")]
    retryable: bool = False


class Resume(Given):
    input: Content | None = None


class Retry(Given):
    pass


class ForkOverrides(Overrides):
    output_schema: JSONSchema | None = None


class Fork(Given):
    """The new thread holds what was said up to that step; 0 is the input alone, null the last committed step."""

    after_step: Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE] | None = None
    overrides: ForkOverrides | None = None
