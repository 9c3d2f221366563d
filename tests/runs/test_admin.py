"""Pages of the admin: who sees them, that nothing of the protocol's rows can be changed there, and what they say."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from uuid import UUID

import pytest
from django.apps import apps
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse

from runs import Agent
from runs.http.events import FORMS
from runs.models import Event, Leg, Run, Step, Usage
from runs.pytest_longhaul import ScriptedModel, call, run_to_end
from tests.runs.scenes import Cast, rows
from threads.ids import new_id
from threads.models import ApiKey, Message, Thread
from tools import ToolFailed, task_ids, tool
from tools.models import ToolAttempt, ToolCall, Worker

pytestmark = pytest.mark.django_db

OURS = [Thread, ApiKey, Message, Run, Leg, Step, Event, Usage, ToolCall, ToolAttempt, Worker]
OWNED = [model for model in OURS if model not in (Thread, ApiKey)]  # by the protocol
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
ESCAPED = "&lt;script&gt;alert("


@tool(idempotent=True)
def look_up(number: int, note: str = "") -> dict[str, Any]:
    """Look an order up <b>now</b>."""
    if number == 13:
        raise ToolFailed("Not this <one>.")
    return {"number": number, "note": note}


@pytest.fixture
def owner() -> User:
    return User.objects.create_user("shopper")


@pytest.fixture
def agent(cast: Cast) -> Agent:
    return cast(name="clerk", tools=[look_up], instructions="Be <brief>.")


@pytest.fixture
def run(agent: Agent, scripted_model: ScriptedModel, owner: User) -> Run:
    """A run that has ended, with a row of every kind."""
    scripted_model.say(
        ["I look.", call("look_up", number=1, note=HOSTILE), call("look_up", number=13)], f"Done: {HOSTILE}"
    )
    run = run_to_end(agent.start(f"Where is it? {HOSTILE}", owner=owner, metadata={"from": HOSTILE}))
    assert run.status == "completed"
    Thread.objects.filter(pk=run.thread_id).update(title=f"Order {HOSTILE}", agent="clerk")
    run.refresh_from_db()
    return run


@pytest.fixture
def api_key(owner: User) -> ApiKey:
    from threads.authentication import create_key

    return create_key(owner, f"laptop {HOSTILE}")[0]


def staff(*permissions: str, name: str = "staff") -> Client:
    """A client of a staff member with these permissions; `*` is every one to view."""
    user = User.objects.create_user(name, is_staff=True)
    wanted = Permission.objects.filter(content_type__app_label__startswith="longhaul_")
    if "*" in permissions:
        user.user_permissions.add(*wanted.filter(codename__startswith="view_"))
    user.user_permissions.add(*wanted.filter(codename__in=permissions))
    client = Client()
    client.force_login(user)
    return client


def list_of(model: Any, **query: Any) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist", query=query)


def page_of(row: Any) -> str:
    return reverse(f"admin:{row._meta.app_label}_{row._meta.model_name}_change", args=[row.pk])


def html(client: Client, url: str, status: int = 200) -> str:
    answer = client.get(url)
    assert answer.status_code == status, (url, answer.status_code)
    return answer.content.decode()


def a_row(model: Any, api_key: ApiKey) -> Any:
    if model is Usage and not Usage.objects.exists():
        run = Run.objects.get()
        Usage.objects.create(run=run, step=1, epoch=1, message_id=new_id(), model=HOSTILE, input_tokens=5)
    if model is Worker and not Worker.objects.exists():
        Worker.objects.create(name=HOSTILE, kind="tools", host="host", pid=1, lock_key=1)
    row = model.objects.first()
    assert row is not None, model
    return row


# --- who sees them --------------------------------------------------------------------------------------------------


def test_every_page_is_there_for_who_may_view_and_for_nobody_else(run: Run, api_key: ApiKey) -> None:
    viewer, other, nobody = staff("*"), staff(name="other"), Client()
    ordinary = Client()
    ordinary.force_login(User.objects.get(username="shopper"))
    urls = [reverse("admin:longhaul_runs_agents")]
    for model in OURS:
        urls += [list_of(model), page_of(a_row(model, api_key))]
    for url in urls:
        html(viewer, url)
        html(other, url, 403)
        for each in (nobody, ordinary):
            answer = each.get(url)
            assert answer.status_code == 302, url
            assert "/login/" in answer["Location"]
    for app in ("longhaul_threads", "longhaul_tools", "longhaul_runs"):
        html(viewer, reverse("admin:app_list", args=[app]))


def test_every_model_that_holds_something_of_a_run_has_a_page() -> None:
    without = {
        "Clock",
        "IdempotencyKey",
        "Approval",
        "StoredContent",
        "RateUse",
        "Pause",
        "Leave",
    }  # the test clock, answers of the API, what a later issue writes, what its call's page has links to, and what `why` is made of
    named = {
        model
        for app in ("longhaul_threads", "longhaul_tools", "longhaul_runs")
        for model in apps.get_app_config(app).get_models()
    }
    assert {model for model in named if not admin.site.is_registered(model)} == {
        model for model in named if model.__name__ in without
    }
    assert set(OURS) == {model for model in named if model.__name__ not in without}


def test_a_page_shows_only_the_kinds_of_rows_that_the_user_may_view(run: Run) -> None:
    alone = staff("view_run")
    page = html(alone, page_of(run))
    assert "completed" in page
    for section in ("messages", "tool-calls", "legs", "steps", "usage", "events"):
        assert f'id="{section}"' not in page
    page = html(staff("*", name="all"), page_of(run))
    for section in ("messages", "tool-calls", "legs", "steps", "usage", "events"):
        assert f'id="{section}"' in page


class OnlyTheirs:
    """A host's policy: nobody sees another's rows, whatever the permissions say."""

    def visible(self, queryset: Any, user: Any) -> Any:
        return queryset.filter(owner=user)

    def may(self, user: Any, verb: str, obj: Any) -> bool:
        return obj is None or obj.owner_id == user.pk


def test_the_policy_of_the_host_counts(run: Run, api_key: ApiKey, settings: Any) -> None:
    settings.LONGHAUL = {"ACCESS": f"{__name__}.OnlyTheirs"}
    client = staff("*", "cancel_run", "change_thread", "delete_thread")
    mine = staff("*", name="mine")
    Run.objects.update(owner=User.objects.get(username="mine"))
    Thread.objects.update(owner=User.objects.get(username="mine"))
    for model in OURS:
        if model in (ApiKey, Worker):
            continue
        row = a_row(model, api_key)
        assert f"/{row.pk}/" not in html(client, list_of(model)), model
        assert client.get(page_of(row)).status_code == 302, model  # Django's answer for what is not there
        assert f"/{row.pk}/" in html(mine, list_of(model)), model
        html(mine, page_of(row))
    assert client.post(reverse("admin:longhaul_runs_run_cancel", args=[run.pk])).status_code == 404


# --- nothing is changed ---------------------------------------------------------------------------------------------


def test_the_rows_of_the_protocol_cannot_be_added_changed_or_deleted(
    run: Run, api_key: ApiKey, admin_client: Client
) -> None:
    examples = {model: a_row(model, api_key) for model in OWNED}
    before = rows()
    for model, row in examples.items():
        name = f"admin:{model._meta.app_label}_{model._meta.model_name}"
        data = {field.attname: "1" for field in model._meta.fields}
        assert admin_client.post(page_of(row), data).status_code == 403, model
        assert admin_client.post(reverse(f"{name}_delete", args=[row.pk]), {"post": "yes"}).status_code == 403, model
        assert admin_client.post(reverse(f"{name}_add"), data).status_code == 403, model
        selected = {"action": "delete_selected", "_selected_action": [str(row.pk)], "post": "yes"}
        admin_client.post(list_of(model), selected)
        assert "<input" not in _readonly(html(admin_client, page_of(row))), model
    assert rows() == before


def _readonly(page: str) -> str:
    """The form of a page, without what every form of the admin has."""
    form = re.search(r'<form [^>]*id="\w+_form".*?</form>', page, re.DOTALL)
    assert form
    return form[0].replace('<input type="hidden" name="csrfmiddlewaretoken"', "")


# --- what they say --------------------------------------------------------------------------------------------------


def test_what_is_hostile_is_text(run: Run, api_key: ApiKey, admin_client: Client) -> None:
    urls = [page_of(run), page_of(run.thread), list_of(Run), list_of(Thread), list_of(ApiKey), page_of(api_key)]
    urls += [page_of(each) for each in Message.objects.filter(run_id=run.pk)] + [list_of(Message)]
    urls += [page_of(each) for each in ToolCall.objects.all()] + [list_of(ToolCall)]
    urls += [page_of(each) for each in Event.objects.filter(run=run)] + [list_of(Event)]
    urls += [list_of(Run, q=HOSTILE), list_of(Run, agent=HOSTILE)]
    urls += [reverse("admin:longhaul_runs_run_cancel", args=[run.pk]), page_of(a_row(Usage, api_key))]
    seen = 0
    for url in urls:
        page = admin_client.get(url, follow=True).content.decode()
        assert "<script>alert" not in page, url
        assert "<img src=x" not in page, url
        seen += ESCAPED in page or "\\u003Cscript" in page
    assert seen > 15


def test_the_page_of_a_run_tells_it_whole(run: Run, admin_client: Client) -> None:
    page = html(admin_client, page_of(run))
    assert run.why().replace("'", "&#x27;") in page
    for words in (
        "I look.",
        "look_up",
        "Not this &lt;one&gt;.",
        "success",
        "failed",
        "test@localhost",
        "run.completed",
    ):
        assert words in page, words
    said = page[page.index('id="messages"') :]
    assert said.index("Where is it?") < said.index("I look.") < said.index("Done: ")
    assert "UTC" in page
    assert str(run.thread_id) in page


def test_a_page_has_no_script_and_no_style_of_its_own(run: Run, api_key: ApiKey, admin_client: Client) -> None:
    urls = [page_of(run), list_of(Run), page_of(run.thread), reverse("admin:longhaul_runs_agents")]
    urls += [reverse("admin:longhaul_threads_apikey_add"), list_of(ApiKey)]
    for url in urls:
        strict = Strict()
        strict.feed(html(admin_client, url))
        assert strict.seen > 50
        assert strict.found == [], url


class Strict(HTMLParser):
    """Finds what `script-src 'self'; style-src 'self'` forbids: attributes first, then elements without a source."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen += 1
        given = dict(attrs)
        self.found += [f"{tag} {name}" for name in given if name == "style" or name.startswith("on")]
        inline = tag == "script" and "src" not in given and given.get("type") != "application/json"
        if tag == "style" or inline:
            self.found.append(tag)
        for name in ("src", "href", "action"):
            if (given.get(name) or "").startswith(("javascript:", "http:", "https:", "//")):
                self.found.append(f"{tag} {name}={given[name]}")


def test_the_agents_are_shown_with_their_tools_and_what_is_broken(
    agent: Agent, cast: Cast, admin_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runs import agents

    def made_up(run: Run) -> str:
        return "x"

    cast(name="maker", instructions=made_up, max_steps=7)
    monkeypatch.setattr(agents.registry, "_broken", {"shop.agents": ImportError("no <module>")})
    page = html(admin_client, reverse("admin:longhaul_runs_agents"))
    for words in (
        "clerk",
        "Be &lt;brief&gt;.",
        "scripted:x",
        "made_up()",
        "max_steps",
        "look_up",
        "number",
        "&lt;b&gt;now",
    ):
        assert words in page, words
    assert "shop.agents" in page
    assert "ImportError: no &lt;module&gt;" in page


# --- finding --------------------------------------------------------------------------------------------------------


def found(client: Client, model: Any, **query: Any) -> set[str]:
    """The ids in a list."""
    answer = client.get(list_of(model, **query))
    assert answer.status_code == 200, answer
    return {str(row.pk) for row in answer.context["cl"].result_list}


def test_runs_are_found_by_what_is_known_of_them(run: Run, agent: Agent, admin_client: Client) -> None:
    other = agent.start("Something else.")
    [call, _] = ToolCall.objects.order_by("index")
    for term in (
        str(run.pk),
        str(run.pk)[:20],
        run.pk.hex,
        str(run.thread_id),
        "shopper",
        "shop",
        "Order <script>",
        task_ids.new("run", run.pk, 1),
        task_ids.new("tool_call", call.pk, 1),
    ):
        assert found(admin_client, Run, q=term) >= {str(run.pk)}, term
        if term not in (str(run.pk)[:20], str(run.thread_id)):  # both were made in one second
            assert str(other.pk) not in found(admin_client, Run, q=term), term
    assert found(admin_client, Run, q="CLER") == {str(run.pk), str(other.pk)}
    assert found(admin_client, Run, q="nothing like it") == set()
    assert found(admin_client, Run, q="\x00") == {str(run.pk), str(other.pk)}
    assert found(admin_client, Run, q=str(new_id())) == set()
    for status, expected in (("completed", run), ("queued", other), ("live", other)):
        assert found(admin_client, Run, status=status) == {str(expected.pk)}
    assert found(admin_client, Run, agent="clerk", origin="start", created="hour") == {str(run.pk), str(other.pk)}
    assert found(admin_client, Run, thread=run.thread_id) == {str(run.pk)}
    assert found(admin_client, Run, before=other.pk) == {str(run.pk)}


def test_threads_and_calls_and_the_rest_are_found(run: Run, api_key: ApiKey, admin_client: Client) -> None:
    assert found(admin_client, Thread, q="order") == {str(run.thread_id)}
    assert found(admin_client, Thread, q="shopper") == {str(run.thread_id)}
    assert found(admin_client, Thread, q=str(run.thread_id)[:13]) >= {str(run.thread_id)}
    assert found(admin_client, Thread, archived="yes") == set()
    calls = {str(each.pk) for each in ToolCall.objects.all()}
    [first, _] = ToolCall.objects.order_by("index")
    assert found(admin_client, ToolCall, q="look") == calls
    assert found(admin_client, ToolCall, q=str(run.pk)) == calls
    assert found(admin_client, ToolCall, q=str(first.pk)) == {str(first.pk)}
    assert found(admin_client, ToolCall, q=task_ids.new("tool_call", first.pk, 1)) == {str(first.pk)}
    assert found(admin_client, ToolCall, outcome="failed", run=run.pk) == calls - {str(first.pk)}
    assert len(found(admin_client, ToolAttempt, call=first.pk)) == 1
    for model in (Event, Leg, Step, Message):
        everything = {str(each.pk) for each in model.objects.all()}
        assert found(admin_client, model, run=run.pk) == everything
        assert found(admin_client, model, q=str(run.pk)) == everything
    assert found(admin_client, Event, run=run.pk, type="run.completed") == {str(Event.objects.order_by("pk").last().pk)}  # type: ignore[union-attr]
    assert found(admin_client, ApiKey, q=api_key.prefix) == {str(api_key.pk)}


@pytest.mark.parametrize(
    "query",
    [
        {"run__owner__username__startswith": "s"},
        {"error__code": "x"},
        {"created_at__year": "2026"},
        {"id__startswith": "0"},
    ],
)
def test_only_the_filters_of_a_list_filter_it(query: dict[str, str], admin_client: Client) -> None:
    for model in (Run, Event, Message):
        assert admin_client.get(list_of(model, **query)).status_code == 400


def test_every_type_of_event_can_be_picked(run: Run, admin_client: Client) -> None:
    page = html(admin_client, list_of(Event))
    assert set(re.findall(r"[?&;]type=([\w.]+)", page)) == set(FORMS)


@pytest.mark.parametrize(
    "query", [{"thread": "x"}, {"before": "x"}, {"p": "99"}, {"created": "never"}, {"o": "3.-1"}, {"status": "'"}]
)
def test_nonsense_is_answered_with_a_list(query: dict[str, str], run: Run, admin_client: Client) -> None:
    assert admin_client.get(list_of(Run, **query), follow=True).status_code == 200


def test_a_task_leads_to_the_page_of_its_row(run: Run, admin_client: Client) -> None:
    [call, _] = ToolCall.objects.order_by("index")
    for kind, row in (("run", run), ("tool_call", call)):
        answer = admin_client.get(reverse("admin:longhaul_runs_task", args=[task_ids.new(kind, row.pk, 1)]))  # type: ignore[arg-type]
        assert answer.status_code == 302
        assert answer["Location"] == page_of(row)
    assert admin_client.get(reverse("admin:longhaul_runs_task", args=["celery-made-this"])).status_code == 404
    outsider = staff("view_run", name="outsider")
    assert (
        outsider.get(reverse("admin:longhaul_runs_task", args=[task_ids.new("tool_call", call.pk, 1)])).status_code
        == 403
    )


def test_tasks_link_to_flower_where_there_is_one(run: Run, admin_client: Client, settings: Any) -> None:
    task = task_ids.new("run", run.pk, 1)
    Leg.objects.filter(run=run).update(task_id=task)
    assert "flower.example" not in html(admin_client, page_of(run))
    settings.LONGHAUL = {"FLOWER_URL": "https://flower.example"}
    for url in (page_of(run), list_of(Leg), page_of(run.leg_set.first())):
        assert f'href="https://flower.example/task/{task}"' in html(admin_client, url)


# --- cancelling -----------------------------------------------------------------------------------------------------


def cancelling(run: Run) -> str:
    return reverse("admin:longhaul_runs_run_cancel", args=[run.pk])


def test_a_run_is_cancelled_from_its_page_with_a_reason(agent: Agent) -> None:
    run = agent.start("Go on for ever.")
    client = staff("*", "cancel_run")
    assert cancelling(run) in html(client, page_of(run))
    asked = html(client, cancelling(run))
    assert str(run.pk) in asked
    run.refresh_from_db()
    assert run.status == "queued", "a look cancels nothing"
    answer = client.post(cancelling(run), {"reason": "It repeats itself.", "confirmed": "yes"}, follow=True)
    assert "1 run cancelled." in answer.content.decode()
    run.refresh_from_db()
    assert (run.status, run.stop_reason) == ("cancelled", "cancelled")
    assert run.error is not None
    assert run.error["message"] == "It repeats itself."
    [entry] = LogEntry.objects.all()
    assert (entry.object_id, entry.user.username) == (str(run.pk), "staff")
    assert "It repeats itself." in entry.get_change_message()
    # A finished one stays as it is, and nothing is logged for it.
    page = client.post(cancelling(run), {"reason": "again", "confirmed": "yes"}, follow=True).content.decode()
    assert "had ended before (cancelled) and is unchanged" in page
    run.refresh_from_db()
    assert run.error is not None
    assert run.error["message"] == "It repeats itself."
    assert LogEntry.objects.count() == 1
    assert cancelling(run) not in page


def test_cancelling_needs_its_permission_and_the_token(agent: Agent) -> None:
    run = agent.start("Go on for ever.")
    viewer = staff("*")
    assert cancelling(run) not in html(viewer, page_of(run))
    assert viewer.get(cancelling(run)).status_code == 403
    assert viewer.post(cancelling(run), {"confirmed": "yes"}).status_code == 403
    assert "cancel_selected" not in html(viewer, list_of(Run))
    chosen = {"action": "cancel_selected", "_selected_action": [str(run.pk)], "confirmed": "yes"}
    viewer.post(list_of(Run), chosen)
    careless = Client(enforce_csrf_checks=True)
    user = User.objects.get(username="staff")
    user.user_permissions.add(Permission.objects.get(codename="cancel_run"))
    careless.force_login(user)
    assert careless.post(cancelling(run), {"confirmed": "yes"}).status_code == 403
    assert careless.post(list_of(Run), chosen).status_code == 403
    blind = staff("cancel_run", name="blind")
    assert blind.post(cancelling(run), {"confirmed": "yes"}).status_code == 404
    run.refresh_from_db()
    assert run.status == "queued"


def test_the_selected_runs_are_cancelled_and_the_finished_ones_told(run: Run, agent: Agent) -> None:
    live = [agent.start("Go on.") for _ in range(3)]
    held = agent.start("And then.", thread=live[0].thread)
    left = agent.start("Not this one.")
    client = staff("*", "cancel_run")
    chosen = [str(each.pk) for each in (*live, held, run)]
    asked = client.post(list_of(Run), {"action": "cancel_selected", "_selected_action": chosen}).content.decode()
    assert "Cancel 4 runs" in asked
    assert "1 of the selected runs has ended already" in asked
    assert all(each in asked for each in chosen[:4])
    assert str(left.pk) not in asked
    assert Run.objects.filter(status="cancelled").count() == 0
    data = {"action": "cancel_selected", "_selected_action": chosen, "confirmed": "yes", "reason": "Clearing up."}
    page = client.post(list_of(Run), data, follow=True).content.decode()
    assert "4 runs cancelled." in page
    assert f"Run {run.pk} had ended before (completed) and is unchanged." in page
    assert set(Run.objects.filter(status="cancelled").values_list("pk", flat=True)) == {
        each.pk for each in (*live, held)
    }
    assert {UUID(each) for each in LogEntry.objects.values_list("object_id", flat=True)} == {
        each.pk for each in (*live, held)
    }
    assert all("Clearing up." in each.get_change_message() for each in LogEntry.objects.all())


def test_select_across_all_pages_cancels_no_more_than_a_batch(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    from runs.admin import cancel

    monkeypatch.setattr(cancel, "AT_ONCE", 2)
    live = [agent.start("Go on.") for _ in range(5)]
    client = staff("*", "cancel_run")
    data = {"action": "cancel_selected", "_selected_action": [str(live[0].pk)], "select_across": "1"}
    asked = client.post(list_of(Run), data).content.decode()
    assert "the most that are cancelled at once" in asked
    named = re.findall(r'name="_selected_action" value="([^"]+)"', asked)
    assert len(named) == 2
    client.post(list_of(Run), {"action": "cancel_selected", "_selected_action": named, "confirmed": "yes"})
    assert {str(pk) for pk in Run.objects.filter(status="cancelled").values_list("pk", flat=True)} == set(named)
    # Said without being asked, it is bounded too.
    client.post(list_of(Run), {**data, "confirmed": "yes"})
    assert Run.objects.filter(status="cancelled").count() == 4


# --- threads --------------------------------------------------------------------------------------------------------


def test_the_words_of_a_thread_are_edited_and_nothing_else(run: Run) -> None:
    client = staff("*", "change_thread")
    thread = run.thread
    data = {
        "title": "New",
        "summary": "S",
        "metadata": '{"a": 1}',
        "archived": "on",
        "agent": "other",
        "owner": "",
        "overrides": "{}",
    }
    before: dict[str, Any] = {**Thread.objects.values().get(pk=thread.pk)}
    assert client.post(page_of(thread), data).status_code == 302
    after: dict[str, Any] = {**Thread.objects.values().get(pk=thread.pk)}
    assert after["archived_at"] is not None
    assert {key for key in after if after[key] != before[key]} == {"title", "summary", "metadata", "archived_at"}
    assert client.post(page_of(thread), {**data, "archived": ""}).status_code == 302
    assert Thread.objects.get(pk=thread.pk).archived_at is None
    for wrong in ('["list"]', '"text"', "{"):
        assert client.post(page_of(thread), {**data, "metadata": wrong}).status_code == 200, wrong
    assert client.post(page_of(thread), {**data, "metadata": '{"a": "\\u0000b"}'}).status_code == 302
    assert Thread.objects.get(pk=thread.pk).metadata == {"a": "b"}
    assert staff("*", name="viewer").post(page_of(thread), data).status_code == 403


def test_deleting_a_thread_cancels_its_live_runs(agent: Agent, django_capture_on_commit_callbacks: Any) -> None:
    client = staff("*", "delete_thread")
    one, two, three = (agent.start("Go on.") for _ in range(3))
    held = agent.start("And then.", thread=one.thread)
    asked = html(client, reverse("admin:longhaul_threads_thread_delete", args=[one.thread_id]))
    assert "Live runs, which are cancelled first: 2" in asked
    assert (
        client.post(reverse("admin:longhaul_threads_thread_delete", args=[one.thread_id]), {"post": "yes"}).status_code
        == 302
    )
    assert not Run.objects.filter(pk__in=[one.pk, held.pk]).exists()
    chosen = {"action": "delete_selected", "_selected_action": [str(each.thread_id) for each in (two, three)]}
    assert "Live runs, which are cancelled first: 2" in client.post(list_of(Thread), chosen).content.decode()
    assert Thread.objects.count() == 2
    rung: list[Any] = []
    client.post(list_of(Thread), {**chosen, "post": "yes"})
    assert Thread.objects.count() == 0
    assert Run.objects.count() == 0
    assert rung == []
    viewer = staff("*", name="viewer")
    four = agent.start("Go on.")
    assert (
        viewer.post(reverse("admin:longhaul_threads_thread_delete", args=[four.thread_id]), {"post": "yes"}).status_code
        == 403
    )


# --- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_is_made_shown_once_and_revoked(owner: User) -> None:
    from threads.authentication import digest

    client = staff("*", "add_apikey", "change_apikey")
    answer = client.post(
        reverse("admin:longhaul_threads_apikey_add"),
        {"owner": owner.pk, "name": "ci", "expires_at_0": "", "expires_at_1": ""},
    )
    page = answer.content.decode()
    [key] = ApiKey.objects.all()
    shown = re.search(r"lh_[\w-]{40,}", page)
    assert shown
    assert digest(shown[0]) == key.digest
    assert "no-store" in answer["Cache-Control"]
    assert not answer.cookies.get("messages")
    for url in (list_of(ApiKey), page_of(key), reverse("admin:longhaul_threads_apikey_history", args=[key.pk])):
        again = html(client, url)
        assert shown[0] not in again
        assert key.digest not in again
    client.post(
        page_of(key),
        {"name": "ci 2", "digest": "0" * 64, "prefix": "x", "revoked_at": "", "expires_at_0": "", "expires_at_1": ""},
    )
    changed = ApiKey.objects.get()
    assert (changed.name, changed.digest, changed.prefix) == ("ci 2", key.digest, key.prefix)
    revoke = {"action": "revoke", "_selected_action": [str(key.pk)]}
    assert "1 revoked." in client.post(list_of(ApiKey), revoke, follow=True).content.decode()
    first = ApiKey.objects.get().revoked_at
    assert first is not None
    assert "1 had been revoked before" in client.post(list_of(ApiKey), revoke, follow=True).content.decode()
    assert ApiKey.objects.get().revoked_at == first
    assert sum("Revoked" in each.get_change_message() for each in LogEntry.objects.all()) == 1


# --- what the bounds leave out --------------------------------------------------------------------------------------


def test_a_filter_without_an_index_looks_at_the_latest_rows_and_says_so(
    run: Run, agent: Agent, admin_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from threads.admin import listing

    newer = [agent.start("Something else.") for _ in range(3)]
    assert found(admin_client, Run, agent="clerk") == {str(each.pk) for each in (run, *newer)}
    monkeypatch.setattr(listing, "WINDOW", 2)
    assert found(admin_client, Run, agent="clerk") == {str(each.pk) for each in newer[1:]}
    assert "has looked at the latest 2 rows" in html(admin_client, list_of(Run, agent="clerk"))
    assert found(admin_client, Run, agent="clerk", before=newer[0].pk) == {str(run.pk)}
    assert "has looked at" not in html(admin_client, list_of(Run, thread=run.thread_id, agent="clerk"))


def test_live_runs_are_found_however_old_unless_very_many_live(
    agent: Agent, admin_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runs.admin import runs as page
    from threads.admin import listing

    live = [agent.start("Go on.") for _ in range(4)]
    monkeypatch.setattr(listing, "WINDOW", 2)
    assert found(admin_client, Run, status="queued") == {str(each.pk) for each in live}
    monkeypatch.setattr(page, "WINDOW", 4)
    assert found(admin_client, Run, status="queued") == {str(each.pk) for each in live[2:]}
    assert found(admin_client, Run, status="live") == {str(each.pk) for each in live[2:]}


def test_a_list_leads_to_what_is_older(agent: Agent, admin_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from threads.admin import listing

    runs = [agent.start("Go on.") for _ in range(5)]
    monkeypatch.setattr(listing, "MOST", 4)
    monkeypatch.setattr(listing.Listed, "list_per_page", 2)
    first = admin_client.get(list_of(Run)).context["cl"]
    assert [row.pk for row in first.result_list] == [runs[4].pk, runs[3].pk]
    assert (first.result_count, first.older) == (4, "")
    last = admin_client.get(list_of(Run, p=2)).context["cl"]
    assert [row.pk for row in last.result_list] == [runs[2].pk, runs[1].pk]
    assert found_at(admin_client, list_of(Run) + last.older) == {str(runs[0].pk)}


def found_at(client: Client, url: str) -> set[str]:
    return {str(row.pk) for row in client.get(url).context["cl"].result_list}


def test_an_owner_is_not_deleted_with_what_the_protocol_owns(run: Run, owner: User, admin_client: Client) -> None:
    page = admin_client.post(reverse("admin:auth_user_delete", args=[owner.pk]), {"post": "yes"})
    assert page.status_code == 403
    assert Run.objects.filter(pk=run.pk).exists()
