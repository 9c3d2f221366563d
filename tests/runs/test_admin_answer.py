"""Saying in the admin what became of a call whose worker died."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.test import Client
from django.urls import reverse

from runs import Agent, Run, agents
from runs.pytest_longhaul import ScriptedModel, WorkerKilled, call, run_to_end
from tests.runs.test_admin import html, page_of, staff
from tools import tool
from tools.models import ToolCall

pytestmark = pytest.mark.django_db


@tool(idempotent=False)
def send(to: str) -> str:
    """Send a mail."""
    raise WorkerKilled


@pytest.fixture
def unknown(scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> ToolCall:
    monkeypatch.setattr(agents.registry, "_agents", dict(agents.registry.all()))
    mailer = agents.registry.add(Agent(name="mailer", model="openai:test", tools=[send]))
    scripted_model.say(call("send", to="<b>ann</b>"))
    run = mailer.start("Send it.")
    with pytest.raises(WorkerKilled):
        run_to_end(run)
    assert run_to_end(run).status == "requires_action"
    return ToolCall.objects.get(run_id=run.pk)


def asking(row: ToolCall) -> str:
    return reverse("admin:longhaul_tools_toolcall_answer", args=[row.pk])


def says(client: Client, row: ToolCall, what: str, text: str) -> str:
    return client.post(asking(row), {"what": what, "text": text}, follow=True).content.decode()


@pytest.mark.parametrize(
    ("what", "text", "outcome", "result", "error"),
    [
        ("result", '{"sent": 1}', "success", {"sent": 1}, None),
        ("result", "it is sent", "success", "it is sent", None),
        ("result", "", "success", None, None),
        pytest.param("result", "[" * 5000, "success", "[" * 5000, None, id="too deep for JSON"),
        ("error", "refused", "failed", None, {"code": "tool_failed", "message": "refused"}),
    ],
)
def test_an_unknown_call_is_settled_from_its_page(
    unknown: ToolCall, what: str, text: str, outcome: str, result: Any, error: Any
) -> None:
    client = staff("*", "change_toolcall")
    assert asking(unknown) in html(client, page_of(unknown))
    assert "See whether it took effect" in html(client, asking(unknown))
    assert ToolCall.objects.get(pk=unknown.pk).status == "unknown", "a look settles nothing"
    assert "Settled" in says(client, unknown, what, text)
    unknown.refresh_from_db()
    assert (unknown.status, unknown.outcome, unknown.result, unknown.error) == ("settled", outcome, result, error)
    assert LogEntry.objects.get(object_id=str(unknown.pk)).change_message.startswith("Settled")
    assert asking(unknown) not in html(client, page_of(unknown))
    assert "it is settled" in says(client, unknown, "error", "again")
    assert LogEntry.objects.count() == 1


def test_an_unknown_call_is_released_from_its_page(unknown: ToolCall) -> None:
    client = staff("*", "change_toolcall")
    page = says(client, unknown, "again", " ")
    assert "Say what happened." in page
    says(client, unknown, "again", "it is in no mailbox")
    unknown.refresh_from_db()
    assert (unknown.status, unknown.attempt) == ("retrying", 2)


def test_a_call_that_is_deleted_meanwhile_is_said_to_be_gone(
    unknown: ToolCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed = ToolCall.succeed

    def gone(call: ToolCall, *given: Any, **more: Any) -> ToolCall:
        Run.objects.get(pk=call.run_id).thread.delete()
        return succeed(call, *given, **more)

    monkeypatch.setattr(ToolCall, "succeed", gone)
    assert "not there any more" in says(staff("*", "change_toolcall"), unknown, "result", "1")
    assert LogEntry.objects.count() == 0


def test_who_may_only_look_is_not_asked(unknown: ToolCall) -> None:
    viewer = staff("*")
    assert asking(unknown) not in html(viewer, page_of(unknown))
    assert viewer.get(asking(unknown)).status_code == 403
    assert viewer.post(asking(unknown), {"what": "error", "text": "x"}).status_code == 403
    assert staff("change_toolcall", name="blind").get(asking(unknown)).status_code in (403, 404)
    assert ToolCall.objects.get(pk=unknown.pk).status == "unknown"
