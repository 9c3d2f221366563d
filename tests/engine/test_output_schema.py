"""An answer that must fit a JSON schema: asked for, read, sent back once, and the schema itself held to what it may cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import orjson
import pytest

from agents_project.demo.model_server import ModelCall, ModelServer, Reply, Text, ToolCall
from runs import agents, engine, output_schema
from runs.agents import Agent
from runs.exceptions import BadInput
from runs.models import Run, Step
from runs.providers import port
from runs.providers.openai import OpenAIProvider
from runs.pytest_longhaul import WorkerKilled, assert_invariants, run_to_end
from threads.models import Message, Thread
from tools import tool

pytestmark = pytest.mark.django_db

PRICE = {
    "type": "object",
    "properties": {"item": {"type": "string"}, "price": {"type": "number", "minimum": 0}},
    "required": ["item", "price"],
    "additionalProperties": False,
}
LAMP = '{"item": "lamp", "price": 12.5}'


@tool
def look_up(item: str) -> float:
    """Look up a price."""
    return 12.5


class Service:
    """A model service: says the replies in order, and keeps the bodies of its requests."""

    def __init__(self) -> None:
        self.replies: list[Reply | str] = []
        self.asked: list[dict[str, Any]] = []

    def __call__(self, call: ModelCall) -> Reply:
        self.asked.append(dict(call.body))
        reply = self.replies.pop(0)
        return [Text(reply)] if isinstance(reply, str) else reply


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    service = Service()
    with ModelServer(service) as server, closing(OpenAIProvider("key", server.url)) as provider:
        monkeypatch.setitem(port._providers, "openai", provider)
        yield service


def clerk(**options: Any) -> Agent:
    return agents.registry.add(Agent(name="clerk", model="openai:x", **{"output_schema": PRICE, **options}))


def ended(agent: Agent, service: Service, *replies: Reply | str, **options: Any) -> Run:
    service.replies += replies
    run = run_to_end(agent.start("What is it?", **options), real_model=True)
    assert not service.replies
    assert_invariants(run)
    return run


def said(run: Run) -> list[tuple[str, str]]:
    return [(each.role, each.text) for each in run.thread.messages.order_by("position")]


def test_the_model_is_asked_for_the_schema_and_the_output_is_the_object(service: Service) -> None:
    run: Any = ended(clerk(), service, LAMP)
    assert (run.status, run.stop_reason, run.output) == ("completed", "end_turn", {"item": "lamp", "price": 12.5})
    asked = {"type": "json_schema", "json_schema": {"name": "output", "schema": PRICE, "strict": False}}
    assert service.asked[0]["response_format"] == asked
    assert Step.objects.get(run=run).asked()["response_format"] == asked
    assert run.event_set.get(type="run.completed").payload["output"] == run.output
    assert said(run)[-1] == ("assistant", LAMP)


FIRST_THINK = {"type": "object", "properties": {"thoughts": {"type": "string"}, "answer": {"type": "number"}}}


@pytest.mark.parametrize("layer", ["agent", "thread", "run"])
def test_the_order_of_a_schemas_fields_is_kept_for_models_write_them_in_it(service: Service, layer: str) -> None:
    agent = clerk(output_schema=FIRST_THINK if layer == "agent" else None)
    thread = Thread.objects.create(overrides=agents.check_overrides({"output_schema": FIRST_THINK}))
    options: dict[str, dict[str, Any]] = {"thread": {"thread": thread}, "run": {"output_schema": FIRST_THINK}}
    ended(agent, service, '{"thoughts": "", "answer": 1}', **options.get(layer, {}))
    sent = service.asked[0]["response_format"]["json_schema"]["schema"]["properties"]
    assert list(sent) == ["thoughts", "answer"]


def test_what_the_options_say_of_the_format_wins(service: Service) -> None:
    run = ended(clerk(options={"response_format": {"type": "json_object"}}), service, LAMP)
    assert service.asked[0]["response_format"] == {"type": "json_object"}
    assert run.output == {"item": "lamp", "price": 12.5}


def test_a_service_that_knows_no_format_is_not_told_of_one(service: Service) -> None:
    run = ended(clerk(options={"response_format": None}), service, LAMP)
    assert "response_format" not in service.asked[0]
    assert run.output == {"item": "lamp", "price": 12.5}


@pytest.mark.parametrize("text", [f"```json\n{LAMP}\n```", f"```\n{LAMP}\n```\n", f"\n  {LAMP}\n"])
def test_json_in_a_block_of_code_is_the_answer(service: Service, text: str) -> None:
    assert ended(clerk(), service, text).output == {"item": "lamp", "price": 12.5}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("It is a lamp.", "it is not JSON"),
        (f"Here it is: {LAMP}", "it is not JSON"),
        ('{"item": "lamp", "price": NaN}', "it is not JSON"),
        ('{"item": "lamp"}', '"price" is a required property'),
        ('{"item": "lamp", "price": -1}', "-1 is less than the minimum of 0 at price"),
        ('{"item": "lamp", "price": 1, "more": 2}', "more"),
        ("[]", 'is not of type "object"'),
        ("[" * 300 + "]" * 300, "it is not JSON"),
    ],
)
def test_an_answer_that_does_not_fit_goes_back_to_the_model_with_the_reason(
    service: Service, text: str, reason: str
) -> None:
    run: Any = ended(clerk(), service, text, LAMP)
    assert (run.status, run.steps, run.output) == ("completed", 2, {"item": "lamp", "price": 12.5})
    told = service.asked[1]["messages"][-1]
    assert told["role"] == "user"
    assert reason in told["content"]
    # It is a row, and an event, so the transcript tells of it and the request can be rebuilt.
    correction = Message.objects.get(run_id=run.pk, role="user", step=1)
    assert (correction.text, correction.position) == (told["content"], 3)
    assert [role for role, _ in said(run)] == ["user", "assistant", "user", "assistant"]
    assert [each.pk for each in Step.objects.get(run=run, number=2).shown()][-1] == correction.pk
    events = run.event_set.filter(type="message.completed").order_by("seq")
    assert [event.payload["role"] for event in events] == ["user", "assistant", "user", "assistant"]


def test_a_second_answer_that_does_not_fit_fails_the_run(service: Service) -> None:
    run: Any = ended(clerk(), service, "a lamp", '{"item": 1, "price": 2}')
    assert (run.status, run.stop_reason, run.output) == ("failed", "model_error", None)
    assert (run.error["code"], run.error["retryable"]) == ("output_invalid", False)
    assert "at item" in run.error["message"]


def test_the_model_is_told_once_in_a_run_though_it_called_a_tool_since(service: Service) -> None:
    call: Reply = [ToolCall("look_up", {"item": "lamp"})]
    run: Any = ended(clerk(tools=[look_up]), service, "a lamp", call, "still a lamp")
    assert (run.status, run.error["code"], run.steps) == ("failed", "output_invalid", 3)


def test_a_call_is_no_answer(service: Service) -> None:
    call: Reply = [Text("Let me look."), ToolCall("look_up", {"item": "lamp"})]
    assert ended(clerk(tools=[look_up]), service, call, LAMP).output == {"item": "lamp", "price": 12.5}


@pytest.mark.parametrize("tools", [[], [look_up]])
def test_on_the_last_step_an_answer_that_does_not_fit_fails_the_run_at_once(service: Service, tools: Any) -> None:
    run: Any = ended(clerk(tools=tools, max_steps=1), service, "a lamp")
    assert (run.status, run.stop_reason, run.error["code"]) == ("failed", "model_error", "output_invalid")
    assert not Message.objects.filter(run_id=run.pk, role="user", step__isnull=False).exists()


def test_on_the_last_step_an_answer_that_fits_is_the_output(service: Service) -> None:
    run: Any = ended(clerk(tools=[look_up], max_steps=1), service, LAMP)
    assert (run.status, run.stop_reason, run.output) == ("completed", "max_steps", {"item": "lamp", "price": 12.5})


@pytest.mark.parametrize("second", [LAMP, "still a lamp"])
def test_a_leg_that_dies_after_the_model_was_told_leaves_it_told(
    service: Service, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    commit: Callable[..., Any] = engine.Leg._commit

    def killed(leg: engine.Leg, *step: Any) -> Any:
        commit(leg, *step)
        raise WorkerKilled

    run = clerk().start("What is it?")
    service.replies += ["a lamp"]
    with monkeypatch.context() as patch, pytest.raises(WorkerKilled):
        patch.setattr(engine.Leg, "_commit", killed)
        run_to_end(run, real_model=True)
    run.refresh_from_db()
    assert (run.status, run.steps) == ("running", 1)
    service.replies += [second]
    run_to_end(run, real_model=True)
    assert (run.status, run.legs, run.steps) == ("completed" if second == LAMP else "failed", 2, 2)
    assert Message.objects.filter(run_id=run.pk, role="user", step__isnull=False).count() == 1
    assert [each["role"] for each in service.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert_invariants(run)


def test_later_runs_see_what_the_model_was_told_unless_the_run_is_not_saved(service: Service) -> None:
    run = ended(clerk(), service, "a lamp", LAMP)
    ended(clerk(), service, LAMP, thread=run.thread)
    assert len(service.asked[2]["messages"]) == 5
    alone = ended(clerk(), service, "a lamp", LAMP, save="none")
    ended(clerk(), service, LAMP, thread=alone.thread)
    assert len(service.asked[5]["messages"]) == 1


def test_a_message_of_the_callers_is_no_correction(service: Service) -> None:
    run = ended(clerk(), service, "a lamp", LAMP, messages=[{"role": "user", "content": "by the way"}])
    assert run.status == "completed"


def test_a_nul_that_json_hides_does_not_fail_the_commit(service: Service) -> None:
    assert ended(clerk(), service, '{"item": "la\\u0000mp", "price": 1}').output == {"item": "lamp", "price": 1}


def test_run_over_thread_over_agent_and_none_of_them_merged(service: Service) -> None:
    number, text, flag = {"type": "number"}, {"type": "string"}, {"type": "boolean"}
    agent = clerk(output_schema=number)
    assert ended(agent, service, "1").output == 1
    thread = Thread.objects.create(overrides={"output_schema": text})
    assert ended(agent, service, '"one"', thread=thread).output == "one"
    assert ended(agent, service, "true", thread=thread, output_schema=flag).output is True
    assert [each["response_format"]["json_schema"]["schema"] for each in service.asked] == [number, text, flag]


# --- the schema itself


def chain(links: int, branches: int = 1) -> dict[str, Any]:
    defs: dict[str, Any] = {f"n{n}": {"allOf": [{"$ref": f"#/$defs/n{n + 1}"}] * branches} for n in range(links)}
    return {"$ref": "#/$defs/n0", "$defs": {**defs, f"n{links}": {"type": "object"}}}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("a string", ["must be a dict"]),
        ([], ["must be a dict"]),
        ({"type": "strin"}, ["type", "strin"]),
        ({"properties": {"a": {"minLength": "x"}}}, ["properties.a.minLength", "integer"]),
        ({"properties": {"a": {"pattern": "("}}}, ["properties.a.pattern"]),
        ({"pattern": "(?=a)b"}, ["pattern"]),
        ({"pattern": r"(\w{500}){500}"}, ["pattern"]),
        ({"$ref": "http://127.0.0.1:9/x"}, ["$ref", "the same schema"]),
        ({"items": {"$ref": "file:///etc/passwd"}}, ["output_schema.items", "the same schema"]),
        ({"$ref": "#/$defs/x"}, ["$ref"]),
        ({"$schema": "http://127.0.0.1:9/x"}, ["$schema"]),
        ({"$dynamicRef": "#x"}, ["$dynamicRef"]),
        ({"items": {"$id": "http://127.0.0.1:9/x"}}, ["$id"]),
        ({"$ref": "#"}, ["never end"]),
        ({"anyOf": [{"$ref": "#"}, {}]}, ["never end"]),
        (chain(20, 2), ["too many"]),
        (chain(100), ["too deep"]),
        ({"description": "x" * 70_000}, ["bytes", "65,536"]),
        ({"const": float("nan")}, ["JSON"]),
        ({"properties": {str(n): {"pattern": "a"} for n in range(101)}}, ["100 patterns"]),
    ],
)
def test_a_schema_that_cannot_be_taken_is_refused_where_it_is_given(schema: Any, words: list[str]) -> None:
    agent = agents.registry.add(Agent(name="clerk", model="openai:x"))
    with pytest.raises(BadInput) as refused:
        agent.start("hello", output_schema=schema)
    for word in words:
        assert word in str(refused.value)
    assert not Run.objects.exists()
    with pytest.raises(BadInput):
        Agent(name="other", output_schema=schema)


TREE: dict[str, Any] = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"properties": {"left": {"$ref": "#/$defs/node"}, "right": {"$ref": "#/$defs/node"}}}},
}
TWICE: dict[str, Any] = {
    "$defs": {"node": {"allOf": [{"properties": {"next": {"$ref": "#/$defs/node"}}}] * 2}},
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        TREE,
        chain(5, 2),
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [{"type": "number"}]},
        {"properties": {"$ref": {"type": "string"}, "$id": {}, "pattern": {"type": "string"}}},
        {
            "$defs": {"a b": {"type": "string"}, "a/b": True},
            "anyOf": [{"$ref": "#/$defs/a%20b"}, {"$ref": "#/$defs/a~1b"}],
        },
        {"const": {"$ref": "http://127.0.0.1:9/x"}},
    ],
)
def test_a_schema_that_can_be_taken_is(schema: dict[str, Any]) -> None:
    assert orjson.loads(output_schema.check(schema)) == schema


LONG = chain(24)
LONG["$defs"]["n24"] = {"properties": {"next": {"$ref": "#/$defs/n0"}}}


# Ways of matching that no automaton of a bounded size holds: each character is followed along a thousand of them.
MANY_WAYS = [f"(?:[ab]{{0,60}}){{20}}c|z{number}" for number in range(90)]


def nested(depth: int, *names: str) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = dict.fromkeys(names, value)
    return value


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        (TWICE, nested(60, "next")),  # 2^60 ways down
        ({"uniqueItems": True}, [{"n": n} for n in range(20_000)]),
        ({"items": {"enum": list(range(5000))}}, [-1] * 50_000),
        ({"items": {"pattern": "^(a+)+$"}}, ["a" * 50_000 + "b"] * 20),
        (TREE, nested(12, "left", "right")),
        ({}, nested(90, "a")),
        (LONG, nested(100, "next")),
        ({"anyOf": [{"pattern": each} for each in MANY_WAYS]}, "ab" * 10_000),
        ({"$defs": {"a": {"pattern": MANY_WAYS[0]}}, "oneOf": [{"$ref": "#/$defs/a"}] * 90}, "ab" * 10_000),
        ({"propertyNames": {"anyOf": [{"pattern": each} for each in MANY_WAYS]}}, {"ab" * 10_000: 1}),
        ({"patternProperties": {each: {} for each in MANY_WAYS}}, {"ab" * 10_000: 1}),
    ],
)
def test_no_answer_is_checked_for_long(schema: dict[str, Any], answer: Any) -> None:
    made = output_schema.of(output_schema.check(schema))
    text = orjson.dumps(answer).decode()
    began = time.process_time()
    try:
        made.read(text)
    except output_schema.OutputInvalid:
        pass
    assert time.process_time() - began < 1  # measured 0.01 to 0.1 s; without the bounds the first would take years


def test_usual_patterns_are_matched_with_long_answers() -> None:
    usual = [
        r"^\d{4}-\d{2}-\d{2}$",
        r"^[\w.+-]+@[\w-]+\.[\w.-]+$",
        "^[A-Z]{2,3}$",
        "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
        r"\S",
    ]
    fields = {f"f{number}": {"type": "string", "pattern": each} for number, each in enumerate(usual * 4)}
    schema = {"items": {"properties": {**fields, "text": {"type": "string"}}, "additionalProperties": False}}
    answer = [{"f0": "2026-11-21", "f1": "ann@example.org", "text": "word " * 100}] * 400
    assert output_schema.of(output_schema.check(schema)).read(orjson.dumps(answer).decode()) == answer


def test_an_answer_that_would_take_long_is_said_to_be_too_large() -> None:
    with pytest.raises(output_schema.OutputInvalid, match="too large or too deep"):
        output_schema.of(output_schema.check(TWICE)).read(orjson.dumps(nested(60, "next")).decode())
    assert output_schema.of(output_schema.check(TWICE)).read('{"next": {"next": {}}}') == {"next": {"next": {}}}
    assert output_schema.of(output_schema.check(TREE)).read(orjson.dumps(nested(10, "left", "right")).decode())
