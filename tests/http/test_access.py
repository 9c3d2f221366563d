"""Who may do what over HTTP, tried on every URL, with every method, as everybody.

`RULES` is the contract, written out: a URL or a method that is not there fails, and so does a view whose rule says less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
from django.contrib.auth.models import AnonymousUser, Group, Permission, User
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.test import Client
from django.urls import URLPattern, path, reverse
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from runs import agents
from runs.http import urls
from runs.http.view import PUBLIC, SIGNED_IN, AsyncView, Rule, View, may, operation, sees
from runs.models import Run
from runs.providers.port import ProviderError
from runs.pytest_longhaul import ScriptedModel, WorkerKilled, call, run_to_end
from tests.http.conftest import Api
from tests.runs.scenes import rows
from threads import access
from threads.authentication import create_key, revoke
from threads.models import Message, Thread
from tools import tool
from tools.models import ToolCall

pytestmark = pytest.mark.django_db

RULES: dict[str, dict[str, Rule]] = {
    "threads": {"GET": SIGNED_IN, "POST": may("create")},
    "thread": {"GET": sees(Thread), "PATCH": may("change", Thread), "DELETE": may("delete", Thread)},
    "messages": {"GET": sees(Thread), "POST": may("save", Thread)},
    "thread-runs": {"POST": may("start", Thread)},
    "thread-stream": {"GET": sees(Thread)},
    "message": {"DELETE": may("delete_message", Message)},
    "runs": {"GET": SIGNED_IN, "POST": may("start")},
    "run": {"GET": sees(Run)},
    "run-events": {"GET": sees(Run)},
    "run-stream": {"GET": sees(Run), "POST": sees(Run)},
    "run-wait": {"GET": sees(Run)},
    "run-steps": {"GET": sees(Run)},
    "run-legs": {"GET": sees(Run)},
    "run-messages": {"GET": sees(Run)},
    "run-tool-calls": {"GET": sees(Run)},
    "run-cancel": {"POST": may("cancel", Run)},
    "run-resume": {"POST": may("resume", Run)},
    "run-retry": {"POST": may("retry", Run)},
    "run-fork": {"POST": may("fork", Run)},
    "tool-calls": {"GET": SIGNED_IN},
    "tool-call": {"GET": sees(ToolCall)},
    "tool-call-content": {"GET": sees(ToolCall)},
    "tool-call-content-part": {"GET": sees(ToolCall)},
    "tool-call-result": {"POST": may("answer", ToolCall)},
    "tool-call-error": {"POST": may("answer", ToolCall)},
    "tool-call-cancel": {"POST": may("cancel", ToolCall)},
    "agents": {"GET": SIGNED_IN},
    "tools": {"GET": SIGNED_IN},
    "usage": {"GET": SIGNED_IN},
    "schema": {"GET": PUBLIC},
    "docs": {"GET": PUBLIC},
    "docs-asset": {"GET": PUBLIC},
    "healthz": {"GET": PUBLIC},
    "readyz": {"GET": PUBLIC},
}
# What staff need beside the owner: to know of a row, and to do something to it.
TO_SEE = {
    Thread: "longhaul_threads.view_thread",
    Message: "longhaul_threads.view_thread",
    Run: "longhaul_runs.view_run",
    ToolCall: "longhaul_runs.view_run",
}
TO_ACT = {
    "change": "longhaul_threads.change_thread",
    "delete": "longhaul_threads.delete_thread",
    "save": "longhaul_threads.add_message",
    "delete_message": "longhaul_threads.delete_message",
    "start": "longhaul_runs.add_run",
    "cancel": "longhaul_runs.cancel_run",
    "resume": "longhaul_runs.add_run",
    "retry": "longhaul_runs.add_run",
    "fork": "longhaul_runs.add_run",
    "answer": "longhaul_tools.change_toolcall",
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
BODIES: dict[str, Any] = {
    "messages": {"content": "hello"},
    "thread-runs": {"agent": "clerk", "input": "hello"},
    "runs": {"agent": "clerk", "input": "hello"},
    "tool-call-result": {"result": 1},
    "tool-call-error": {"message": "It was not sent."},
}
QUERIES = {"run-wait": "?timeout_seconds=0"}
# The test client speaks WSGI, which cannot stream: who is let in hears that.
ELSE = {"run-stream": 501, "thread-stream": 501}


def view_of(pattern: URLPattern) -> Any:
    return getattr(pattern.callback, "cls", None)


def problems(patterns: list[Any]) -> list[str]:
    """Say what of the URLs is not behind the gate, or not in the contract."""
    found = []
    for pattern in patterns:
        if not isinstance(pattern, URLPattern):
            found.append(f"{pattern} is not one URL")
            continue
        view = view_of(pattern)
        if not (isinstance(view, type) and issubclass(view, View)):
            found.append(f"{pattern.name} is not a View of the API")
            continue
        gate = AsyncView if issubclass(view, AsyncView) else View
        for step in (
            "initial",
            "dispatch",
            "operation",
            "operations",
            "get_authenticators",
            "_sign_in",
            "_given",
            "_row",
        ):
            # The same function: a view that had one of its own could let anybody in.
            if getattr(getattr(view, step), "__func__", getattr(view, step)) is not getattr(
                getattr(gate, step), "__func__", getattr(gate, step)
            ):
                found.append(f"{pattern.name} has a gate of its own: {step}")
        if pattern.callback.initkwargs:  # type: ignore[attr-defined]
            found.append(f"{pattern.name} is made with options of its own")
        declared = {method.upper(): said.rule for method, said in view.operations().items()}
        if pattern.name not in RULES:
            found.append(f"{pattern.name} has no rule in the contract")
        elif declared != RULES[pattern.name]:
            found.append(f"{pattern.name} lets others in than the contract says: {declared}")
    return found


def test_every_url_is_behind_the_gate_and_in_the_contract() -> None:
    assert problems(urls.urlpatterns) == []
    assert {pattern.name for pattern in urls.urlpatterns} == set(RULES)


class TestWhatTheContractFinds:
    """It is no use if it finds nothing."""

    def test_a_function(self) -> None:
        def naked(request: HttpRequest) -> HttpResponse:
            return HttpResponse("all runs")

        assert problems([path("x", naked, name="x")]) == ["x is not a View of the API"]

    def test_a_view_of_drf(self) -> None:
        class Naked(APIView):
            def get(self, request: Request) -> Response:
                return Response([])

        assert problems([path("x", Naked.as_view(), name="x")]) == ["x is not a View of the API"]

    def test_a_method_without_a_rule_cannot_even_be_routed(self) -> None:
        class Forgotten(View):
            def get(self, request: Request) -> Response:
                return Response([])

        with pytest.raises(ImproperlyConfigured, match=r"Forgotten\.get has no access rule"):
            Forgotten.as_view()

    def test_a_new_url(self) -> None:
        class New(View):
            @operation(sees(Run))
            def get(self, request: Request, run: Run) -> Response:
                return Response([])

        assert problems([path("x/<uuid:id>", New.as_view(), name="x")]) == ["x has no rule in the contract"]

    def test_a_rule_that_was_loosened(self) -> None:
        class Loose(View):
            @operation(sees(Run))
            def post(self, request: Request, run: Run) -> Response:
                return Response([])

        (told,) = problems([path("x/<uuid:id>", Loose.as_view(), name="run-cancel")])
        assert told.startswith("run-cancel lets others in")

    def test_a_method_that_was_added(self) -> None:
        class More(View):
            @operation(sees(Run))
            def get(self, request: Request, run: Run) -> Response:
                return Response([])

            @operation(SIGNED_IN)
            def delete(self, request: Request) -> Response:
                return Response([])

        (told,) = problems([path("x/<uuid:id>", More.as_view(), name="run")])
        assert told.startswith("run lets others in")

    def test_a_gate_of_its_own(self) -> None:
        class Own(View):
            def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
                self.given = {}

            @operation(sees(Run))
            def get(self, request: Request) -> Response:
                return Response([])

        assert problems([path("x", Own.as_view(), name="run")]) == ["run has a gate of its own: initial"]


# --- everybody, everywhere ------------------------------------------------------------------------------------------


@dataclass
class Caller:
    """Somebody who calls. `signed_in` is None for those who are nobody to the API."""

    name: str
    client: Client
    headers: dict[str, str]
    user: User | None

    def send(self, method: str, address: str, body: Any = None) -> Any:
        data = {} if body is None else {"data": orjson.dumps(body), "content_type": "application/json"}
        return self.client.generic(method, address, headers=self.headers, **data)  # type: ignore[arg-type]


def with_key(name: str, key: str, user: User | None = None) -> Caller:
    return Caller(name, Client(), {"Authorization": f"Bearer {key}"}, user)


def with_session(user: User) -> Caller:
    client = Client()
    client.force_login(user)
    return Caller(f"{user.username}, signed in", client, {}, user)


def staff(name: str, *permissions: str) -> User:
    user = User.objects.create_user(name, is_staff=True)
    return granted(user, *permissions)


def granted(user: User, *permissions: str) -> User:
    known = Permission.objects.select_related("content_type")
    found = [each for each in known if f"{each.content_type.app_label}.{each.codename}" in permissions]
    assert len(found) == len(set(permissions))
    user.user_permissions.add(*found)
    return user


@tool
def look_up(number: int) -> str:
    """Look up an order."""
    return f"order {number}"


@tool(idempotent=False)
def refund(number: int) -> str:
    """Refund an order."""
    raise WorkerKilled


@dataclass
class Scene:
    """A thread with a run that has failed after a step, so that all can be done to it; and a message, and a tool call."""

    owner: User | None
    thread: Thread
    run: Run
    lose: Callable[[], ToolCall]

    def __post_init__(self) -> None:
        message = Message.objects.filter(thread=self.thread).order_by("position").first()
        assert message is not None
        self.message = message
        self.call = ToolCall.objects.get(run_id=self.run.pk)

    def address(self, name: str) -> str:
        ids: dict[str, list[Any]] = {"docs-asset": ["start.js"]}
        rule = next(iter(RULES[name].values()))
        if name.startswith("tool-call-") and "content" not in name:
            self.call = self.lose()  # what people say is about a call that is not settled
        if rule.of is not None:
            row = {Thread: self.thread, Run: self.run, Message: self.message, ToolCall: self.call}[rule.of]
            ids[name] = [row.pk, 0] if name == "tool-call-content-part" else [row.pk]
        return reverse(f"longhaul:{name}", args=ids.get(name)) + QUERIES.get(name, "")


Play = Callable[[User | None], Scene]


@pytest.fixture
def play(db: None, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> Play:
    monkeypatch.setattr(agents.registry, "_agents", {**agents.registry.all()})
    clerk = agents.registry.add(agents.Agent(name="clerk", model="openai:test", tools=[look_up, refund]))

    def lost(owner: User | None) -> ToolCall:
        scripted_model.say(call("refund", number=1042))
        run = clerk.start("Refund order 1042.", owner=owner)
        with pytest.raises(WorkerKilled):
            run_to_end(run)
        run_to_end(run)
        return ToolCall.objects.get(run_id=run.pk, status="unknown")

    def made(owner: User | None) -> Scene:
        scripted_model.say(call("look_up", number=1042), ProviderError("auth", "the key is wrong"))
        run = clerk.start("Where is order 1042?", owner=owner)
        run_to_end(run)
        assert (run.status, run.steps) == ("failed", 1)
        return Scene(owner, run.thread, run, lambda: lost(owner))

    return made


@pytest.fixture
def nobodies(db: None) -> list[Caller]:
    ann, gone = User.objects.get_or_create(username="ann")[0], User.objects.create_user("gone")
    revoked_row, revoked = create_key(ann, "revoked")
    revoke(revoked_row)
    _, expired = create_key(ann, "expired", lasts=timedelta(0))
    _, inactive = create_key(gone)
    left = with_session(gone)
    User.objects.filter(pk=gone.pk).update(is_active=False)
    return [
        Caller("nobody", Client(), {}, None),
        with_key("a revoked key", revoked),
        with_key("an expired key", expired),
        with_key("a made-up key", "lh_" + "x" * 43),
        with_key("an inactive owner's key", inactive),
        Caller("an inactive user, signed in", left.client, {}, None),
        Caller("a password", Client(), {"Authorization": "Basic YW5uOnB3"}, None),
    ]


@pytest.fixture
def somebodies(db: None) -> list[Caller]:
    ann = User.objects.get_or_create(username="ann")[0]
    every = {*TO_SEE.values(), *TO_ACT.values()}
    users = [
        ann,
        granted(User.objects.create_user("bob, no staff, with all permissions"), *every),
        staff("staff without permissions"),
        staff("staff who see", *TO_SEE.values()),
        staff("staff who may act and not see", *(set(TO_ACT.values()))),
        staff("staff with all permissions", *every),
        User.objects.create_superuser("root"),
    ]
    sessions = [with_session(user) for user in (ann, users[1], users[2], users[-1])]
    return [*(with_key(user.username, create_key(user)[1], user) for user in users), *sessions]


def expected(rules: dict[str, Rule], method: str, user: User | None, owner: User | None) -> int | None:
    """The status that the contract wants, None for being let in."""
    rule = rules.get("GET" if method == "HEAD" else method)
    if rule is not None and rule.public:
        return None
    if all(each.public for each in rules.values()):
        return 405
    if user is None:
        return 401
    if rule is None:
        return 405
    if rule.of is None or (owner is not None and user == owner):
        return None
    if not (user.is_staff and user.has_perm(TO_SEE[rule.of])):
        return 404
    return None if rule.verb == "view" or user.has_perm(TO_ACT[rule.verb]) else 403


@contextmanager
def undone() -> Iterator[None]:
    with transaction.atomic():
        yield
        transaction.set_rollback(True)


@pytest.mark.parametrize(
    ("name", "owned"),
    [
        pytest.param(name, owned, id=f"{name}-{'ann' if owned else 'nobody'}'s")
        for name in sorted(RULES)
        for owned in (True, False)
        if owned or any(rule.of for rule in RULES[name].values())  # else there is no row whose owner would matter
    ],
)
def test_everybody_is_answered_as_the_contract_says(
    name: str, owned: bool, play: Play, nobodies: list[Caller], somebodies: list[Caller]
) -> None:
    owner = User.objects.get(username="ann") if owned else None
    scene = play(owner)
    address = scene.address(name)
    let_in: list[tuple[Caller, str]] = []
    before = rows()
    # A row without an owner differs for who is signed in, and where it is asked for.
    callers = [*nobodies, *somebodies] if owned else somebodies
    # What there is not is refused before anybody's rows are looked at: one of each kind of callers shows it.
    all_methods = [nobodies[0], somebodies[0], somebodies[-1]] if owned else []
    for caller in callers:
        methods = METHODS if caller in all_methods else tuple(RULES[name])
        for method in methods:
            body = BODIES.get(name, {}) if method not in ("GET", "HEAD") else None
            status = expected(RULES[name], method, caller.user, owner)
            if status is None:
                let_in.append((caller, method))
                continue
            response = caller.send(method, address, body)
            assert response.status_code == status, (caller.name, method, response.content)
            assert response["Content-Type"] == "application/json"
            if status == 401:
                assert response["WWW-Authenticate"] == 'Bearer realm="longhaul"'
            if status == 405:
                allowed = {*RULES[name], *({"HEAD"} if "GET" in RULES[name] else ())}
                assert set(response["Allow"].split(", ")) == allowed
            for secret in (str(scene.thread.pk), str(scene.run.pk), "1042", "clerk"):
                assert secret not in response.content.decode().replace(address, "")
    assert rows() == before
    assert let_in, "somebody must be let in"
    for caller, method in let_in:
        body = BODIES.get(name, {}) if method not in ("GET", "HEAD") else None
        with undone():
            response = caller.send(method, address, body)
        said = view_of(next(each for each in urls.urlpatterns if each.name == name)).operations()
        answers = set(said["get" if method == "HEAD" else method.lower()].answers)
        assert response.status_code in answers | {ELSE.get(name)}, (caller.name, method, response.content)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for name, rules in RULES.items()
        for method, rule in rules.items()
        if rule.of and rule.verb != "view"
    ],
)
def test_staff_need_just_the_one_permission(name: str, method: str, play: Play) -> None:
    scene = play(User.objects.create_user("ann"))
    rule = RULES[name][method]
    see, act = TO_SEE[rule.of], TO_ACT[rule.verb]  # type: ignore[index]
    allowed = with_session(staff("one", see, act))
    not_allowed = with_session(staff("all but one", see, *({*TO_SEE.values(), *TO_ACT.values()} - {act})))
    unseeing = with_session(staff("acts unseeing", *({*TO_SEE.values(), *TO_ACT.values()} - {see})))
    address, body = scene.address(name), BODIES.get(name, {})
    assert not_allowed.send(method, address, body).status_code == 403
    assert unseeing.send(method, address, body).status_code == 404
    assert allowed.send(method, address, body).status_code in (200, 201, 202, 204)


@pytest.mark.parametrize(
    "name", sorted(name for name, rules in RULES.items() if any(rule.of for rule in rules.values()))
)
def test_what_may_not_be_seen_is_answered_like_what_is_not_there(name: str, play: Play, api_of: Any) -> None:
    scene = play(User.objects.create_user("ann"))
    bob: Api = api_of("bob")
    there = scene.address(name)
    rule = next(iter(RULES[name].values()))
    row: Any = {Thread: scene.thread, Run: scene.run, Message: scene.message, ToolCall: scene.call}[rule.of]  # type: ignore[index]
    nowhere = there.replace(str(row.pk), str(uuid4()))
    for method in METHODS:
        body = BODIES.get(name, {}) if method not in ("GET", "HEAD") else None
        answers = [bob.client.generic(
            method, address, orjson.dumps(body) if body is not None else b"", "application/json",
            headers={"Authorization": f"Bearer {bob.key}"},
        ) for address in (there, nowhere)]  # fmt: skip
        assert answers[0].status_code in (404, 405)
        assert answers[0].status_code == answers[1].status_code
        assert answers[0].content == answers[1].content
        assert dict(answers[0].items()) == dict(answers[1].items())


# --- what is in bodies, queries and answers -------------------------------------------------------------------------


@pytest.fixture
def theirs(play: Play) -> Scene:
    return play(User.objects.create_user("ann"))


@pytest.fixture
def bob(api_of: Any) -> Api:
    made: Api = api_of("bob")
    return made


def same(bob: Api, method: str, address: str, body: Any, ids: tuple[Any, Any], status: int) -> None:
    """Somebody else's id gets the answer of one that is nobody's, to the letter."""
    answers = []
    for id in ids:
        sent = None if body is None else orjson.loads(orjson.dumps(body).replace(b"ID", str(id).encode()))
        response = bob.call(method, address.replace("ID", str(id)), sent, status=status)
        answers.append(response.content.decode().replace(str(id), "ID"))
    assert answers[0] == answers[1]


def test_somebody_elses_ids_in_bodies_and_queries_are_like_ids_of_nothing(theirs: Scene, bob: Api, play: Play) -> None:
    own = play(bob.user)
    nothing = uuid4()
    runs = f"/api/threads/{own.thread.pk}/runs"
    same(bob, "post", "/api/runs", {"agent": "clerk", "message": "ID"}, (theirs.message.pk, nothing), 400)
    same(bob, "post", runs, {"agent": "clerk", "message": "ID"}, (theirs.message.pk, nothing), 400)
    same(bob, "get", f"/api/threads/{own.thread.pk}/messages?after=ID", None, (theirs.message.pk, nothing), 400)
    same(bob, "get", f"/api/runs/{own.run.pk}/messages?after=ID", None, (theirs.message.pk, nothing), 400)
    same(bob, "get", "/api/runs?thread=ID", None, (theirs.thread.pk, nothing), 200)
    same(bob, "get", "/api/tool-calls?run=ID", None, (theirs.run.pk, nothing), 200)
    same(bob, "get", "/api/tool-calls?assignee=ID", None, (theirs.owner.pk, 10**6), 200)  # type: ignore[union-attr]


def test_lists_hold_what_is_seen_and_nothing_else(theirs: Scene, bob: Api, play: Play) -> None:
    assert theirs.owner is not None
    ann = Api(theirs.owner, create_key(theirs.owner)[1])
    root = User.objects.create_superuser("root")
    everything = Api(root, create_key(root)[1])
    Thread.objects.filter(pk=theirs.thread.pk).update(metadata={"team": "a"})
    Run.objects.filter(pk=theirs.run.pk).update(metadata={"team": "a"})
    systems = play(None)
    for address in ("/api/threads", "/api/runs", "/api/runs?metadata.team=a", "/api/tool-calls"):
        assert bob.get(address) == {"next": None, "previous": None, "results": []}
        assert len(ann.get(address)["results"]) == 1
        assert len(everything.get(address)["results"]) == (1 if "metadata" in address else 2)
    assert bob.get("/api/usage")["results"] == []
    assert systems.run.owner_id is None


def test_somebody_elses_cursor_shows_only_ones_own_rows(theirs: Scene, bob: Api, play: Play) -> None:
    assert theirs.owner is not None
    ann = Api(theirs.owner, create_key(theirs.owner)[1])
    own = play(bob.user)
    play(theirs.owner)
    page = ann.get("/api/runs?limit=1")
    assert page["next"]
    query = page["next"].partition("?")[2]
    seen = bob.get(f"/api/runs?{query}")["results"]
    assert {run["id"] for run in seen} <= {str(own.run.pk)}
    assert str(own.run.pk) not in page["next"]


def test_an_idempotency_key_is_its_users_own(theirs: Scene, bob: Api) -> None:
    assert theirs.owner is not None
    ann = Api(theirs.owner, create_key(theirs.owner)[1])
    key = {"Idempotency-Key": "order-1042"}
    first = ann.post("/api/threads", {"title": "Ann's"}, 201, **key)
    second = bob.post("/api/threads", {"title": "Bob's"}, 201, **key)
    assert first["id"] != second["id"]
    assert second["title"] == "Bob's"


def test_a_run_that_went_to_somebody_else_is_not_streamed_again(bob: Api, theirs: Scene, monkeypatch: Any) -> None:
    """The first answer of an idempotency key is told again, but a stream would show what the run says now."""
    from runs.http import runs as module

    monkeypatch.setattr(module, "can_stream", lambda request: True)
    body, key = {"agent": "clerk", "input": "mine", "stream": True}, {"Idempotency-Key": "k"}
    first = bob.call("post", "/api/runs", body, status=200, **key)
    again = bob.call("post", "/api/runs", body, status=200, **key)
    assert first["X-Run-Id"] == again["X-Run-Id"]
    Run.objects.filter(pk=UUID(first["X-Run-Id"])).update(owner=theirs.owner)
    bob.call("post", "/api/runs", body, status=404, **key)
    Run.objects.filter(pk=UUID(first["X-Run-Id"])).delete()
    bob.call("post", "/api/runs", body, status=404, **key)


def test_why_names_no_run_that_is_not_seen(theirs: Scene, bob: Api, play: Play) -> None:
    """What waits, waits for a run of its own thread; the runs of others are not told of."""
    ours = bob.post("/api/runs", {"agent": "clerk", "input": "one"}, 202)
    held = bob.post(f"/api/threads/{ours['thread']}/runs", {"agent": "clerk", "input": "two"}, 202)
    assert held["status"] == "held"
    assert ours["id"] in held["why"]
    assert str(theirs.run.pk) not in held["why"]


# --- the host's own policy ------------------------------------------------------------------------------------------


class ByTeam:
    """Who shares a group with the owner sees a row; who is in `leads` may do all."""

    def visible(self, queryset: QuerySet[Any], user: Any) -> QuerySet[Any]:
        return queryset.filter(Q(owner=user) | Q(owner__groups__in=user.groups.all()))

    def may(self, user: Any, verb: str, obj: Any) -> bool:
        asked.append((verb, type(obj)))
        if verb == "start" and obj is None:
            return bool(user.username != "intern")
        return obj is None or obj.owner_id == user.pk or bool(user.groups.filter(name="leads").exists())


class Broken:
    def visible(self, queryset: QuerySet[Any], user: Any) -> QuerySet[Any]:
        raise RuntimeError("the team's service is away, and row 1042 is secret")

    def may(self, user: Any, verb: str, obj: Any) -> bool:
        raise RuntimeError("the team's service is away, and row 1042 is secret")


asked: list[tuple[str, type]] = []


def test_a_policy_of_the_host_decides_everywhere(
    theirs: Scene, bob: Api, api_of: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.asked", [], raising=True)
    settings.LONGHAUL = {"ACCESS": f"{__name__}.ByTeam"}
    shop, second, leads = (Group.objects.create(name=name) for name in ("shop", "second", "leads"))
    assert theirs.owner is not None
    theirs.owner.groups.add(shop, second)
    bob.user.groups.add(shop, second)
    eve, lead, intern = api_of("eve", is_superuser=True, is_staff=True), api_of("lead"), api_of("intern")
    lead.user.groups.add(shop, leads)
    for address in ("/api/threads", "/api/runs", "/api/tool-calls"):
        # Both share two groups with the owner; a row is there once.
        assert [len(each.get(address)["results"]) for each in (bob, lead, eve)] == [1, 1, 0]
    run, thread = f"/api/runs/{theirs.run.pk}", f"/api/threads/{theirs.thread.pk}"
    for address in (run, f"{run}/events", f"{run}/wait?timeout_seconds=0", f"{run}/legs", thread, f"{thread}/messages"):
        bob.get(address)
        eve.get(address, 404)  # the permission of a superuser is not this policy's
    bob.get(f"{run}/stream", 501)
    eve.get(f"{run}/stream", 404)
    bob.post(f"{run}/cancel", status=403)
    bob.post(f"{thread}/runs", {"agent": "clerk", "input": "x"}, 403)
    bob.call("delete", f"/api/messages/{theirs.message.pk}", status=403)
    lead.post(f"{run}/cancel", status=200)
    started = lead.post(f"{thread}/runs", {"agent": "clerk", "input": "x"}, 202)
    assert Run.objects.get(pk=started["id"]).owner == theirs.owner
    lead.post("/api/runs", {"agent": "clerk", "input": "x"}, 202)
    intern.post("/api/runs", {"agent": "clerk", "input": "x"}, 403)
    assert set(asked) >= {("cancel", Run), ("start", Thread), ("start", type(None)), ("delete_message", Thread)}
    assert {kind for _, kind in asked} <= {Run, Thread, type(None)}  # asked about threads and runs only


def test_a_policy_that_raises_shows_and_does_nothing(theirs: Scene, settings: Any) -> None:
    assert theirs.owner is not None
    ann = Api(theirs.owner, create_key(theirs.owner)[1])
    ann.client.raise_request_exception = False  # else the test's client raises what the host is told of
    addresses = {name: theirs.address(name) for name in RULES}
    settings.LONGHAUL = {"ACCESS": f"{__name__}.Broken"}
    before = rows()
    for name, rules in RULES.items():
        for method, rule in rules.items():
            if rule.public or (not rule.of and not rule.verb and name in ("agents", "tools")):
                continue
            body = BODIES.get(name, {}) if method != "GET" else None
            response = ann.call(method.lower(), addresses[name], body)
            assert response.status_code == 500, (name, method)
            told = response.json()
            assert told["type"] == "server_error"
            assert "1042" not in response.content.decode()
            assert str(theirs.run.pk) not in response.content.decode()
    assert rows() == before


def test_who_has_not_signed_in_sees_and_may_do_nothing(play: Play) -> None:
    """Not even what has no owner: an anonymous user's key is None too."""
    scene = play(None)
    policy = access.Policy()
    assert not policy.visible(Run.objects.all(), AnonymousUser()).exists()
    assert not policy.may(AnonymousUser(), "view", scene.run)
    assert not policy.may(AnonymousUser(), "start", None)
