"""Keys of the API: made by a command, kept as a digest, taken until they are revoked, expired or their owner is gone."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.test import Client
from rest_framework.authentication import BaseAuthentication
from rest_framework.request import Request

from tests.http.conftest import Api
from threads import clock
from threads.authentication import NOTED_EVERY, create_key, digest, revoke
from threads.models import ApiKey

pytestmark = pytest.mark.django_db


@pytest.fixture
def ann(db: None) -> User:
    return User.objects.create_user("ann", email="ann@example.org")


def made(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    capsys.readouterr()
    call_command("create_api_key", *arguments)
    told = capsys.readouterr()
    return told.out, told.err


def status(key: str) -> int:
    return asked(f"Bearer {key}").status_code


def asked(authorization: str) -> Any:
    return Client().get("/api/threads", headers={"Authorization": authorization})


def code(authorization: str) -> str:
    found: str = asked(authorization).json()["errors"][0]["code"]
    return found


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_key_that_is_taken(ann: User, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = made(capsys, "--user", "ann", "--name", "my laptop")
    key = out.strip()
    assert out == f"{key}\n"  # alone on stdout: KEY=$(manage.py create_api_key --user ann)
    assert "not shown again" in err
    assert key not in err
    assert status(key) == 200
    row = ApiKey.objects.get()
    assert (row.owner, row.name, row.expires_at) == (ann, "my laptop", None)


def test_the_command_in_json(ann: User, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = made(capsys, "--user", "ann", "--expires", "30", "--json")
    told = json.loads(out)
    row = ApiKey.objects.get()
    assert told["id"] == str(row.pk)
    assert told["user"] == "ann"
    assert row.expires_at is not None
    assert told["expires_at"].startswith(f"{row.expires_at:%Y-%m-%dT%H:%M:%S}")
    assert timedelta(days=29) < row.expires_at - clock.now() <= timedelta(days=30)
    assert status(told["key"]) == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--user", "eve"], ["no user 'eve'", "ann"]),
        (["--user", "gone"], ["not active"]),
        (["--user", "ann", "--expires", "0"], ["whole number of days", "'0'"]),
        (["--user", "ann", "--expires=-3"], ["whole number of days", "'-3'"]),
        (["--user", "ann", "--expires", "soon"], ["whole number of days", "'soon'"]),
        (["--user", "ann", "--expires", "99999999999"], ["whole number of days"]),
        (["--user", "ann", "--name", "x" * 201], ["201 characters"]),
        (["--user", "ann", "--name", "a\0b"], ["printable"]),
        (["--user", "an\0n"], ["printable"]),
        ([], ["--user"]),
    ],
    ids=str,
)
def test_the_command_says_what_is_wrong(ann: User, arguments: list[str], words: list[str]) -> None:
    User.objects.create_user("gone", is_active=False)
    with pytest.raises(CommandError) as told:
        call_command("create_api_key", *arguments)
    for word in words:
        assert word in str(told.value)
    assert not ApiKey.objects.exists()


def test_the_command_finds_a_user_as_their_model_names_them(
    ann: User, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(User, "USERNAME_FIELD", "email")
    out, _ = made(capsys, "--user", "ann@example.org", "--json")
    assert json.loads(out)["user"] == "ann@example.org"


# --- what is taken --------------------------------------------------------------------------------------------------


def test_only_the_digest_is_stored(ann: User) -> None:
    _, key = create_key(ann)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT k::text FROM {ApiKey._meta.db_table} k")
        (stored,) = cursor.fetchone()
    assert digest(key) in stored
    assert key not in stored
    assert key[9:] not in stored  # what is shown of it is its beginning
    assert len({create_key(ann)[1] for _ in range(20)}) == 20


def test_a_revoked_key_is_not_taken(ann: User) -> None:
    row, key = create_key(ann)
    assert status(key) == 200
    assert revoke(row)
    assert not revoke(row)
    assert (status(key), code(f"Bearer {key}")) == (401, "key_revoked")


def test_a_key_expires(ann: User, longhaul_clock: Callable[[timedelta], None]) -> None:
    _, key = create_key(ann, lasts=timedelta(days=2))
    assert status(key) == 200
    longhaul_clock(timedelta(days=2, seconds=-30))
    assert status(key) == 200
    longhaul_clock(timedelta(seconds=31))
    assert (status(key), code(f"Bearer {key}")) == (401, "key_expired")


def test_a_key_goes_with_its_owner(ann: User) -> None:
    _, key = create_key(ann)
    User.objects.filter(pk=ann.pk).update(is_active=False)
    assert (status(key), code(f"Bearer {key}")) == (401, "inactive")
    ann.delete()
    assert status(key) == 401
    assert not ApiKey.objects.exists()


@pytest.mark.parametrize("form", ["Bearer KEY", "bearer KEY", "BEARER  KEY", " Bearer KEY "])
def test_forms_of_the_header_that_are_taken(ann: User, form: str) -> None:
    assert asked(form.replace("KEY", create_key(ann)[1])).status_code == 200


@pytest.mark.parametrize(
    "form",
    [
        "KEY", "Bearer", "Bearer ", "Token KEY", "Basic KEY", "Bearer KEYx", "Bearer KEY,Bearer KEY", "Bearer KEY KEY",
        "BearerKEY", "Bearer lh_", "Bearer lh_\u00e9", "Bearer 'KEY'", "",
    ],
)  # fmt: skip
def test_forms_of_the_header_that_are_not(ann: User, form: str) -> None:
    response = asked(form.replace("KEY", create_key(ann)[1]))
    assert response.status_code == 401
    assert response["WWW-Authenticate"] == 'Bearer realm="longhaul"'


def test_a_key_in_the_query_or_the_body_is_no_key(ann: User) -> None:
    _, key = create_key(ann)
    assert Client().get(f"/api/threads?key={key}&access_token={key}").status_code == 401
    assert Client().post("/api/threads", json.dumps({"key": key}), "application/json").status_code == 401


class OfTheHost(BaseAuthentication):
    """Takes bearer tokens of the host's own."""

    def authenticate(self, request: Request) -> Any:
        _, _, token = request.headers.get("Authorization", "").partition(" ")
        return (User.objects.get(username=token.removeprefix("host-")), token) if token.startswith("host-") else None


def test_bearer_tokens_that_are_not_ours_go_to_the_host(ann: User, settings: Any) -> None:
    assert asked("Bearer host-ann").status_code == 401
    settings.REST_FRAMEWORK = {"DEFAULT_AUTHENTICATION_CLASSES": [f"{__name__}.OfTheHost"]}
    assert asked("Bearer host-ann").status_code == 200
    assert asked("Bearer lh_ann").status_code == 401
    assert status(create_key(ann)[1]) == 200


# --- when it was used last ------------------------------------------------------------------------------------------


def test_the_last_use_is_noted_once_a_minute(ann: User, longhaul_clock: Callable[[timedelta], None]) -> None:
    row, key = create_key(ann)

    def used() -> Any:
        row.refresh_from_db()
        return row.last_used_at

    def writes() -> int:
        from django.test.utils import CaptureQueriesContext

        with CaptureQueriesContext(connection) as queries:
            assert status(key) == 200
        return sum("UPDATE" in query["sql"] for query in queries)

    assert used() is None
    assert writes() == 1
    first = used()
    assert first is not None
    assert writes() == 0
    assert used() == first
    longhaul_clock(NOTED_EVERY + timedelta(seconds=1))
    assert writes() == 1
    assert used() > first
    revoke(row)
    last = used()
    longhaul_clock(NOTED_EVERY * 2)
    assert status(key) == 401
    assert used() == last


@pytest.mark.django_db(transaction=True)
def test_nobody_waits_for_who_notes_the_same_use(ann: User) -> None:
    row, key = create_key(ann)
    answers: list[int] = []

    def other() -> None:
        try:
            answers.append(status(key))
        finally:
            connection.close()

    with transaction.atomic():
        ApiKey.objects.select_for_update().get(pk=row.pk)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(20)  # seconds: it is held up for as long as we hold the row, or not at all
        assert answers == [200]
    assert ApiKey.objects.get(pk=row.pk).last_used_at is None
    assert status(key) == 200
    assert ApiKey.objects.get(pk=row.pk).last_used_at is not None


# --- where a key must not show --------------------------------------------------------------------------------------


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(message)s %(pathname)s %(exc_text)s"))
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(f"{self.format(record)} {record.__dict__!r}")


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """All that any logger says, with what it carries."""
    kept, root = Kept(), logging.getLogger()
    level = root.level
    root.addHandler(kept)
    root.setLevel(logging.DEBUG)
    yield kept.said
    root.removeHandler(kept)
    root.setLevel(level)


def test_a_key_is_in_no_log_and_no_answer(api_of: Callable[..., Api], logged: list[str], settings: Any) -> None:
    api = api_of("bob")
    revoked = ApiKey.objects.get(owner=api.user)
    api.client.raise_request_exception = False
    logging.getLogger("tests").warning("the trap is set")
    answers = [
        api.call("get", "/api/threads"),
        api.call("get", f"/api/runs/{revoked.pk}"),
        api.call("put", "/api/runs"),
    ]
    settings.LONGHAUL = {"ACCESS": f"{__name__}.Broken"}
    answers.append(api.call("get", "/api/threads"))
    revoke(revoked)
    answers.append(api.call("get", "/api/threads"))
    assert [answer.status_code for answer in answers] == [200, 404, 405, 500, 401]
    told = "\n".join(logged)
    assert "the trap is set" in told
    assert "RuntimeError" in told
    for text in (told, *(answer.content.decode() + str(answer.items()) for answer in answers)):
        assert api.key not in text
        assert digest(api.key) not in text


class Broken:
    def visible(self, queryset: Any, user: Any) -> Any:
        raise RuntimeError("no")

    def may(self, user: Any, verb: str, obj: Any) -> bool:
        raise RuntimeError("no")


def test_a_report_of_an_error_does_not_show_the_key(ann: User, monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    """What Django mails to admins holds the variables of each frame, and the headers."""
    from django.test import RequestFactory
    from django.views.debug import ExceptionReporter

    from threads import authentication

    _, key = create_key(ann)

    def broken() -> None:
        raise RuntimeError("the database is away")

    monkeypatch.setattr(authentication, "Now", broken)
    request = RequestFactory().get("/api/threads", headers={"Authorization": f"Bearer {key}"})
    wrapped = Request(request)
    with pytest.raises(RuntimeError) as caught:
        authentication.ApiKeyAuthentication().authenticate(wrapped)
    frames = caught.tb.tb_next  # without the test's own, which knows the key
    report = ExceptionReporter(request, caught.type, caught.value, frames)
    for told in (report.get_traceback_html(), report.get_traceback_text()):
        assert "the database is away" in told
        assert key not in told


def test_the_admin_shows_neither_the_key_nor_its_digest(ann: User) -> None:
    from django.urls import reverse

    row, key = create_key(ann, "my laptop")
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    for address in (
        reverse("admin:longhaul_threads_apikey_changelist"),
        reverse("admin:longhaul_threads_apikey_change", args=[row.pk]),
    ):
        page = client.get(address).content.decode()
        assert "my laptop" in page
        assert key not in page
        assert digest(key) not in page
