"""What a person says of a call whose worker died, over HTTP: once, by who may, and in time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from runs.agents import Agent, registry
from runs.http.events import FORMS
from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, WorkerKilled, call, run_to_end
from tests.http.conftest import Api
from threads.exceptions import BadInput
from tools import lifecycle, tool
from tools.models import ToolCall

pytestmark = pytest.mark.django_db


@tool(idempotent=False)
def send(to: str) -> str:
    """Send a mail."""
    if not Sent.again:
        raise WorkerKilled
    return "sent"


class Sent:
    again = False


@pytest.fixture
def unknown(api: Api, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An `unknown` call as the inbox shows it."""
    monkeypatch.setattr(registry, "_agents", dict(registry.all()))
    monkeypatch.setattr(Sent, "again", False)
    mailer = registry.add(Agent(name="mailer", model="openai:test", tools=[send]))
    scripted_model.say(call("send", to="ann"), "Over.")
    run = mailer.start("Send it.", owner=api.user)
    with pytest.raises(WorkerKilled):
        run_to_end(run)
    assert run_to_end(run).status == "requires_action"
    [found] = api.get("/api/tool-calls?needs=decision")["results"]
    yield found
    scripted_model.replies.clear()  # those of a run that need not go on


def gone_on(found: Any) -> Run:
    return run_to_end(Run.objects.get(pk=found["run"]))


def refused(answer: Any) -> str:
    return str(answer["errors"][0]["code"])


def test_a_result_settles_it_once_and_the_run_goes_on(api: Api, unknown: Any) -> None:
    path = f"/api/tool-calls/{unknown['id']}"
    answer = api.post(f"{path}/result", {"result": {"sent": 1}}, 200)
    assert (answer["status"], answer["outcome"], answer["result"]) == ("settled", "success", {"sent": 1})
    assert [attempt["outcome"] for attempt in answer["attempts"]] == ["lost"]
    assert api.get("/api/tool-calls?needs=decision")["results"] == []
    before = api.get(f"/api/runs/{unknown['run']}/events")
    for again in ("result", "error"):
        body = {"result": 2} if again == "result" else {"message": "no", "retryable": True}
        assert refused(api.post(f"{path}/{again}", body, 409)) == "already_settled"
    assert api.get(path) == answer
    assert api.get(f"/api/runs/{unknown['run']}/events") == before
    told = next(each for each in before["results"] if each["type"] == "tool_call.settled")
    assert told["by"] == str(api.user.pk)
    assert gone_on(unknown).output == "Over."


def test_an_error_is_what_the_model_reads(api: Api, unknown: Any, scripted_model: ScriptedModel) -> None:
    answer = api.post(f"/api/tool-calls/{unknown['id']}/error", {"message": "The server refused it."}, 200)
    assert (answer["outcome"], answer["error"]) == (
        "failed",
        {"code": "tool_failed", "message": "The server refused it."},
    )
    assert gone_on(unknown).output == "Over."
    assert "The server refused it." in str(scripted_model.requests[-1].messages)


def test_a_retryable_error_runs_it_again_on_that_persons_word(
    api: Api, unknown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/api/tool-calls/{unknown['id']}"
    answer = api.post(f"{path}/error", {"message": "It is in no mailbox.", "retryable": True}, 200)
    assert (answer["status"], answer["attempt"], answer["max_attempts"]) == ("retrying", 2, 2)
    assert refused(api.post(f"{path}/result", {"result": 1}, 409)) == "not_awaited"
    monkeypatch.setattr(Sent, "again", True)
    assert gone_on(unknown).output == "Over."
    settled = api.get(path)
    assert [attempt["outcome"] for attempt in settled["attempts"]] == ["released", "success"]
    assert refused(api.post(f"{path}/error", {"message": "no"}, 409)) == "already_settled"


@pytest.mark.parametrize(
    ("verb", "body", "other"),
    [("result", {"result": 1}, {"result": 2}), ("error", {"message": "no"}, {"message": "n"})],
)
def test_an_answer_that_is_sent_again_with_its_key_is_answered_again(
    api: Api, unknown: Any, verb: str, body: dict[str, Any], other: dict[str, Any]
) -> None:
    path = f"/api/tool-calls/{unknown['id']}/{verb}"
    first = api.post(path, body, 200, **{"Idempotency-Key": "a"})
    assert api.post(path, body, 200, **{"Idempotency-Key": "a"}) == first
    assert refused(api.post(path, other, 409, **{"Idempotency-Key": "a"})) == "idempotency_conflict"
    assert refused(api.post(path, body, 409, **{"Idempotency-Key": "b"})) == "already_settled"


def test_a_cancel_closes_the_call_alone(api: Api, unknown: Any) -> None:
    path = f"/api/tool-calls/{unknown['id']}/cancel"
    answer = api.post(path, {"reason": "she has left"}, 200)
    assert (answer["outcome"], answer["error"]) == ("cancelled", {"code": "cancelled", "message": "she has left"})
    assert api.post(path, {}, 200) == answer
    assert gone_on(unknown).output == "Over."


@pytest.mark.parametrize(
    ("verb", "body", "attr"),
    [
        ("result", {}, "result"),
        ("result", {"result": 1, "outcome": "success"}, "outcome"),
        ("error", {}, "message"),
        ("error", {"message": " "}, "message"),
        ("error", {"message": "x", "retryable": "perhaps"}, "retryable"),
    ],
)
def test_what_cannot_be_taken_is_named_and_changes_nothing(
    api: Api, unknown: Any, verb: str, body: Any, attr: str
) -> None:
    answer = api.post(f"/api/tool-calls/{unknown['id']}/{verb}", body, 400)
    assert answer["errors"][0]["attr"] == attr
    assert ToolCall.objects.get(pk=unknown["id"]).status == "unknown"


def test_a_call_whose_thread_is_deleted_meanwhile_is_not_found(
    api: Api, unknown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = lifecycle.answer

    def late(*given: Any, **more: Any) -> Any:
        Run.objects.get(pk=unknown["run"]).thread.delete()
        return answer(*given, **more)

    monkeypatch.setattr(lifecycle, "answer", late)
    for verb, body in (("result", {"result": 1}), ("cancel", {})):
        api.post(f"/api/tool-calls/{unknown['id']}/{verb}", body, 404)


def test_the_log_names_who_said_so_as_the_schema_tells(api: Api, unknown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sent, "again", True)
    path = f"/api/tool-calls/{unknown['id']}"
    api.post(f"{path}/error", {"message": "It is in no mailbox.", "retryable": True}, 200)
    gone_on(unknown)
    log = api.get(f"/api/runs/{unknown['run']}/events")["results"]
    assert [event["by"] for event in log if "by" in event] == [str(api.user.pk)]
    for event in log:
        assert set(event) <= set(FORMS[event["type"]].model_fields), event


def test_what_cannot_be_kept_is_refused(api: Api, unknown: Any) -> None:
    row = ToolCall.objects.get(pk=unknown["id"])
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for wrong in (object(), "\ud800", b"\xff", deep, {"a": float("nan")}, {"n": 10**30}, "a\0"):
        with pytest.raises(BadInput, match="cannot be kept"):
            row.succeed(wrong)
    assert ToolCall.objects.get(pk=row.pk).status == "unknown"
    api.post(f"/api/tool-calls/{row.pk}/result", {"result": {"n": 10**30}}, 400)
    assert row.succeed({"n": str(10**30)}).result == {"n": str(10**30)}


def test_null_is_a_result(api: Api, unknown: Any) -> None:
    assert api.post(f"/api/tool-calls/{unknown['id']}/result", {"result": None}, 200)["outcome"] == "success"
