"""Results that are too large for a model, and files: kept apart, whole, and cut or described for everybody else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any
from unittest import mock
from uuid import uuid4

import pytest
from django.contrib.auth.models import User
from django.test import Client
from pydantic import BaseModel

from runs import agents
from runs.models import Event, Run
from runs.pytest_longhaul import ScriptedModel, WorkerKilled, assert_invariants, call, run_to_end
from runs.verification import verify
from tests.engine.tool_runs import SECRET, only_call, secret_got_out, told, took
from tests.http.conftest import Api
from threads.authentication import create_key
from threads.exceptions import BadInput
from tools import File, ToolCall, ToolContext, ToolFailed, lifecycle, tool
from tools.models import StoredContent
from tools.results import UNSHOWN

pytestmark = pytest.mark.django_db

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
LONG = "a line of a log\n" * 10_000  # 160,000 characters


def call_of(run: Run) -> Any:
    """The run's call. Untyped: a result is anything."""
    return only_call(run)


def returning(result: Any, *, atomic: bool = False) -> Any:
    @tool(name="answer", atomic=atomic)
    def answer() -> Any:
        """Answer."""
        return result() if callable(result) else result

    return answer


@pytest.fixture
def user() -> User:
    return User.objects.create_user("ann")


@pytest.fixture
def api(user: User) -> Api:
    return Api(user, create_key(user, name="test")[1])


@pytest.mark.parametrize("atomic", [False, True])
def test_a_long_text_is_cut_for_all_and_kept_whole(
    scripted_model: ScriptedModel, api: Api, user: User, atomic: bool
) -> None:
    run = took(scripted_model, returning(LONG, atomic=atomic), owner=user)
    made = call_of(run)
    assert made.stored == [
        {"number": 0, "name": "result.txt", "content_type": "text/plain; charset=utf-8", "size": 160_000}
    ]
    assert made.result.startswith(LONG[:20_000] + "\n\n[Cut: this is the first 20,000 of 160,000 characters;")
    assert "140,000 are missing" in made.result
    assert f"GET /api/tool-calls/{made.pk}/content]" in made.result
    assert len(made.result) < 20_300

    # Then the event, the message and the model have what the call has, and none of them more.
    [settled] = Event.objects.filter(run=run, type="tool_call.settled").values_list("payload", flat=True)
    assert (settled["result"], settled["stored"]) == (made.result, made.stored)
    assert [(part["result"], part["stored"]) for part in told(run)] == [(made.result, made.stored)]
    sent = b"".join(message for request in scripted_model.requests for message in request.messages)
    assert len(sent) < 30_000
    assert json.dumps(made.result)[1:200].encode() in sent

    shown = api.get(f"/api/tool-calls/{made.pk}")
    assert (shown["result"], shown["stored"]) == (made.result, made.stored)
    whole = api.call("get", f"/api/tool-calls/{made.pk}/content", status=200)
    assert whole.content.decode() == LONG
    assert whole["Content-Disposition"] == 'attachment; filename="result.txt"'
    assert (whole["Content-Type"], whole["X-Content-Type-Options"]) == ("text/plain; charset=utf-8", "nosniff")
    assert made.content().text == LONG
    assert not verify(run).differences
    assert_invariants(run)


def test_large_data_is_cut_as_its_json_and_kept_whole(scripted_model: ScriptedModel, api: Api, user: User) -> None:
    rows = [{"number": number, "name": "äöü"} for number in range(3_000)]
    run = took(scripted_model, returning(rows), owner=user)
    made = call_of(run)
    assert made.result.startswith('[{"number":0,"name":"äöü"},{"number":1,')
    whole = api.call("get", f"/api/tool-calls/{made.pk}/content", status=200)
    assert (whole["Content-Type"], json.loads(whole.content)) == ("application/json", rows)


class Point(BaseModel):
    at: date
    price: Decimal
    picture: File | None = None


@dataclass
class Report:
    points: list[Point]
    text: File


def test_files_within_a_result_stand_apart_and_are_described_in_their_place(
    scripted_model: ScriptedModel, api: Api, user: User
) -> None:
    def result() -> Report:
        picture = File("chart.png", "image/png", PNG)
        points = [Point(at=date(2026, 11, 22), price=Decimal("4.90"), picture=picture)]
        return Report(points, File("../über uns.csv", data="a;b\n1;2\n"))

    run = took(scripted_model, returning(result), owner=user)
    made = call_of(run)
    chart = {"number": 1, "name": "chart.png", "content_type": "image/png", "size": len(PNG)}
    table = {"number": 2, "name": "über uns.csv", "content_type": "text/csv", "size": 8}
    assert made.stored == [chart, table]
    assert made.result == {
        "points": [{"at": "2026-11-22", "price": "4.90", "picture": {"type": "file", **chart, "note": UNSHOWN}}],
        "text": {"type": "file", **table, "text": "a;b\n1;2\n"},  # the model reads a text
    }
    for number, content, kind in ((1, PNG, "image/png"), (2, b"a;b\n1;2\n", "text/csv")):
        answer = api.call("get", f"/api/tool-calls/{made.pk}/content/{number}", status=200)
        assert (answer.content, answer["Content-Type"]) == (content, kind)
        assert answer["Content-Disposition"].startswith("attachment; filename")
        assert answer["X-Content-Type-Options"] == "nosniff"
    # Nothing of the result itself is missing, so its whole is what the call has.
    assert json.loads(api.call("get", f"/api/tool-calls/{made.pk}/content", status=200).content) == made.result
    assert_invariants(run)


def test_a_file_alone_is_the_whole_result(scripted_model: ScriptedModel) -> None:
    run = took(scripted_model, returning(File("chart.png", data=PNG)))
    made = call_of(run)
    assert made.stored == [{"number": 0, "name": "chart.png", "content_type": "image/png", "size": len(PNG)}]
    assert made.result == {"type": "file", **made.stored[0], "note": UNSHOWN}
    assert (made.content().data, made.content().content_type) == (PNG, "image/png")


def test_a_long_text_file_is_cut_for_the_model_and_a_file_beside_too_much_data_is_kept(
    scripted_model: ScriptedModel,
) -> None:
    made = call_of(took(scripted_model, returning(File("log.txt", data=LONG))))
    assert made.result["text"].startswith("a line of a log\n")
    assert "of 160,000 characters; " in made.result["text"]
    assert len(json.dumps(made.result)) < 23_000
    assert made.content().text == LONG
    other = returning(lambda: {"rows": [*range(10_000)], "file": File("log.txt", data=LONG)})
    made = call_of(took(scripted_model, other))
    assert [each["number"] for each in made.stored] == [0, 1]
    assert json.loads(made.content().data)["rows"] == [*range(10_000)]
    assert made.content(1).text == LONG


def test_what_is_not_there_or_not_ones_own_is_not_found(scripted_model: ScriptedModel, api: Api, user: User) -> None:
    made = call_of(took(scripted_model, returning(LONG), owner=user))
    api.call("get", f"/api/tool-calls/{made.pk}/content/1", status=404)
    api.call("get", f"/api/tool-calls/{made.pk}/content/99999999999999999999", status=404)
    api.call("get", f"/api/tool-calls/{uuid4()}/content", status=404)
    other = User.objects.create_user("bob")
    api.key = create_key(other, name="other")[1]
    api.call("get", f"/api/tool-calls/{made.pk}/content", status=404)
    assert api.call("get", f"/api/tool-calls/{made.pk}/content/0", status=404)["Content-Type"] == "application/json"


def test_a_call_without_a_result_has_no_content(scripted_model: ScriptedModel, api: Api, user: User) -> None:
    @tool
    def broken() -> None:
        """Fail."""
        raise ToolFailed("The printer is on fire.")

    made = call_of(took(scripted_model, broken, owner=user))
    api.call("get", f"/api/tool-calls/{made.pk}/content", status=404)


def test_the_contents_go_with_the_thread(scripted_model: ScriptedModel, api: Api, user: User) -> None:
    run = took(scripted_model, returning(LONG), owner=user)
    assert StoredContent.objects.count() == 1
    api.delete(f"/api/threads/{run.thread_id}")
    assert not StoredContent.objects.exists()
    assert not ToolCall.objects.exists()


def test_the_admin_shows_what_is_cut_and_links_to_the_whole(scripted_model: ScriptedModel) -> None:
    made = call_of(run := took(scripted_model, returning({"log": File("<b>.html", data=b"<script>")})))
    admin = Client()
    admin.force_login(User.objects.create_superuser("root"))
    link = f"/admin/longhaul_tools/toolcall/{made.pk}/content/1/"
    for page in (
        f"/admin/longhaul_tools/toolcall/{made.pk}/change/",
        f"/admin/longhaul_runs/run/{run.pk}/change/",
    ):
        shown = admin.get(page).content.decode()
        assert link in shown
        assert "&lt;b&gt;.html" in shown
        assert "<b>.html" not in shown
    answer = admin.get(link)
    assert (answer.content, answer["X-Content-Type-Options"]) == (b"<script>", "nosniff")
    assert answer["Content-Disposition"].startswith("attachment;")
    assert admin.get(link.replace("content/1", "content/2")).status_code == 404
    stranger = Client()
    stranger.force_login(User.objects.create_user("eve", is_staff=True))
    assert stranger.get(link).status_code in (403, 404)


def test_the_limits_are_settings(scripted_model: ScriptedModel, settings: Any) -> None:
    settings.LONGHAUL = {**settings.LONGHAUL, "MAX_RESULT_CHARS": 1_000, "MAX_RESULT_BYTES": 2_000}
    made = call_of(took(scripted_model, returning("x" * 1_500)))
    assert made.result.startswith("x" * 1_000 + "\n\n[Cut: ")
    made = call_of(took(scripted_model, returning("x" * 2_001)))
    assert made.error is not None
    assert made.error["code"] == "invalid_result"
    assert "at most 2,000 bytes" in made.error["message"]


def test_the_words_of_a_failure_are_cut_too(scripted_model: ScriptedModel) -> None:
    @tool
    def broken() -> None:
        """Fail at length."""
        raise ToolFailed(LONG)

    made = call_of(took(scripted_model, broken))
    assert made.error is not None
    assert len(made.error["message"]) < 20_300
    assert "140,000 are missing" in made.error["message"]


def test_a_secret_in_the_words_of_a_failure_is_masked_before_they_are_cut(scripted_model: ScriptedModel) -> None:
    @tool
    def broken() -> None:
        """Fail with what must not be told."""
        raise ToolFailed(f"{'x' * 19_978} {SECRET} and more {SECRET} {LONG}")

    run = took(scripted_model, broken)
    assert not secret_got_out(scripted_model, run)
    message = call_of(run).error["message"]
    assert "hunte" not in message
    assert "[Cut: this is the first 20,000 of" in message


def test_a_person_may_answer_with_a_file_and_not_with_too_much(scripted_model: ScriptedModel) -> None:
    @tool(idempotent=False)
    def send() -> str:
        """Send."""
        raise WorkerKilled

    agent = agents.registry.add(agents.Agent(name="clerk", model="scripted:x", tools=[send]))
    scripted_model.say(call("send"), "done")
    run = agent.start("hello")
    with pytest.raises(WorkerKilled):
        run_to_end(run)
    run_to_end(run)
    made = call_of(run)
    assert made.status == "unknown"
    with pytest.raises(BadInput, match="too large"):
        made.succeed("x" * 10_000_001)
    made.succeed({"scan": File("scan.txt", data=LONG), "rest": LONG})
    assert [each["number"] for each in made.stored] == [0, 1]
    assert made.content(1).text == LONG
    assert run_to_end(run).output == "done"
    assert_invariants(run)


def test_a_result_that_comes_too_late_leaves_nothing(scripted_model: ScriptedModel) -> None:
    @tool
    def slow(ctx: ToolContext) -> str:
        """Be cancelled meanwhile."""
        ToolCall.objects.get(pk=ctx.tool_call.pk).cancel()
        return LONG

    run = took(scripted_model, slow)
    made = call_of(run)
    assert (made.outcome, made.result, made.stored) == ("cancelled", None, None)
    assert not StoredContent.objects.exists()
    assert_invariants(run)


def test_a_settlement_that_is_sent_again_keeps_the_contents_once(scripted_model: ScriptedModel) -> None:
    with mock.patch.object(lifecycle, "settle", side_effect=twice(lifecycle.settle)):
        run = took(scripted_model, returning(LONG))
    made = call_of(run)
    assert (made.outcome, made.contents.count()) == ("success", 1)
    assert_invariants(run)


def twice(settle: Any) -> Any:
    def again(*args: Any, **options: Any) -> Any:
        answer = settle(*args, **options)
        assert settle(*args, **options) == {"already": True}
        return answer

    return again
