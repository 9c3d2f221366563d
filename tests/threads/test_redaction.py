"""What is known as a secret, by its value or its form, is masked; what is a word stays."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from django.conf import LazySettings
from django.core.exceptions import ImproperlyConfigured
from django.test import Client, RequestFactory
from pytest_django.fixtures import Settings

from threads import redaction
from threads.authentication import PREFIX
from threads.redaction import redact

LONG = "Zq8-canary-Zq8-canary"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    redaction._told.clear()
    redaction._values.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://user:{LONG}@db:5432/name is away",
        f"redis://:{LONG}@cache/0",
        f"postgresql://user:with@{LONG}@db/name",
        f"GET https://maps.example/v1?q=x&api_key={LONG}&z=1",
        f"/hook?token={LONG}",
        f"https://storage.example/x?X-Amz-Signature={LONG}",
        f"Authorization: Bearer {LONG}",
        f"{{'Authorization': 'Basic {LONG}'}}",
        f"a header Bearer {LONG}1 was sent",
        f"Incorrect API key provided: {LONG}. Look at your keys.",
        f"host=db password={LONG} user=x",
        f"{{'password': '{LONG}', 'user': 'x'}}",
        f'{{"api_key": "{LONG}"}}',
        f'{{\\"client_secret\\": \\"{LONG}\\"}}',
        f"Cookie: sessionid={LONG}; csrftoken={LONG}",
        f"the key {PREFIX}{LONG} is wrong",
        f"sk-proj-{LONG}",
        f"ghp_{LONG.replace('-', '')}0123456789",
        f"eyJhbGciOiJIUzI1NiJ9.eyJ{LONG}.{LONG}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{LONG}\n{LONG}\n-----END RSA PRIVATE KEY-----",
        f'null value violates\nDETAIL:  Failing row contains (1, "{LONG}").\n',
    ],
)
def test_a_secret_of_a_known_form_is_masked(text: str) -> None:
    told = redact(text)
    assert LONG not in told
    assert LONG.replace("-", "") not in told
    assert "[masked]" in told
    assert redact(told) == told


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens: 4096 is too large",
        "input_tokens=55123 and token_budget: 100000",
        "Basic authentication is not enough",
        "the token is wrong; give a Bearer token",
        "The run reached its limit: token budget.",
        "a monkey: banana, a keyboard: dvorak",
        "Run 0199a3f0-6b1c-7cc4-9d2e-3c1f0a5b7e11 of desk-assistant claimed",
        "GET /api/runs/0199a3f0-6b1c-7cc4-9d2e-3c1f0a5b7e11?starting_after=3 200",
        "http://127.0.0.1:8000/admin/ and amqp://rabbit:5672//",
        "task-based risk-assessment-document disk-12345678",
        "PL/pgSQL function longhaul_run_claim(uuid) line 3 at RAISE",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_what_the_settings_and_the_environment_hold_as_a_secret_is_masked_wherever_it_stands(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.PAYMENT_API_KEY = "plain-words-of-a-key"
    settings.MAILER = {"host": "mail", "auth": {"user": "x", "password": "p&ss<wörd>"}}
    settings.LONGHAUL_CACHE_URL = "redis://user:p%40ss-in-a-url@cache/0"
    monkeypatch.setenv("VENDOR_SECRET", "of-the-environment")
    redaction._values.cache_clear()
    told = redact(
        "xplain-words-of-a-keyx p&ss<wörd> p&amp;ss&lt;wörd&gt; p@ss-in-a-url p%40ss-in-a-url of-the-environment"
    )
    assert told == "x[masked]x [masked] [masked] [masked] [masked] [masked]"
    assert settings.SECRET_KEY not in redact(f"the key is {settings.SECRET_KEY}")


@pytest.mark.parametrize("secret", ["with'one-quote", 'with"the-other', "with'bo\"th", "back\\slash'ed", 'wörd"quoted'])
def test_a_secret_with_quotes_is_masked_in_python_and_in_json(settings: Settings, secret: str) -> None:
    settings.VENDOR_SECRET = secret
    for text in (secret, repr(secret), repr({"p": f'"{secret}"'}), json.dumps([secret]), f"x='{secret}'"):
        assert secret[:4] not in redact(text).replace("\\", ""), text


def test_a_short_password_is_masked_as_a_word_of_its_own_and_leaves_other_words(settings: Settings) -> None:
    settings.DATABASE_COPY = "postgresql://postgres:postgres@db/x"
    assert redact("postgres; postgresql://db") == "[masked]; postgresql://db"


def test_names_of_classes_and_files_are_no_secrets(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/tmp/of/an-agent.socket")
    monkeypatch.setenv("GOOGLE_API_KEY_FILE", "/run/secrets/google")
    redaction._values.cache_clear()
    backends = " ".join(settings.AUTHENTICATION_BACKENDS)
    text = f"{settings.AUTH_USER_MODEL} {backends} /tmp/of/an-agent.socket /run/secrets/google"
    assert redact(text) == text


def test_a_program_may_tell_of_a_secret() -> None:
    assert redact("from-a-vault") == "from-a-vault"
    redaction.hide("from-a-vault")
    assert redact("'from-a-vault'") == "'[masked]'"
    redaction.hide("short")
    assert redact("short") == "short"


def test_lines_before_the_settings_are_read_hide_none_of_them_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's own lines, and those of its children that have inherited what it knew."""
    lazy = LazySettings()
    monkeypatch.setattr(redaction, "settings", lazy)
    assert redact("Listening at plain-words-of-a-key") == "Listening at plain-words-of-a-key"
    assert not lazy.configured, "it was a log line that read the settings"
    lazy.configure(PAYMENT_API_KEY="plain-words-of-a-key")
    assert redact("plain-words-of-a-key") == "[masked]"


def test_what_cannot_be_looked_through_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: bool) -> None:
        raise ImproperlyConfigured("no settings")

    with monkeypatch.context() as patched:
        patched.setattr(redaction, "_values", broken)
        assert redact("anything") == "[masked]"


def test_a_long_text_is_looked_through_in_little_time() -> None:
    pieces = ("a", "key=", "://:", "token ", "eyJ", "passwd-", "eyJ-", "\n", "?a", "token" + " " * 500)
    began = time.perf_counter()
    for piece in pieces:
        redact(piece * (30_000 // len(piece)))
    assert time.perf_counter() - began < 4  # seconds; 0.2 on an idle machine, minutes for a careless pattern


def test_djangos_page_of_an_error_shows_no_secret(settings: Settings) -> None:
    settings.DEBUG = True
    settings.VAULT_URL = f"https://robot:{LONG}@vault.example/"
    request = RequestFactory().get("/x", {"q": "1"}, headers={"authorization": f"Bearer {LONG}"})
    dsn = f"postgresql://user:{LONG}@db/name"
    try:
        raise ValueError(f"cannot reach {dsn}")
    except ValueError as error:
        reporter = redaction.Reporter(request, type(error), error, error.__traceback__)
    assert settings.DEFAULT_EXCEPTION_REPORTER == "threads.redaction.Reporter"
    for page in (reporter.get_traceback_html(), reporter.get_traceback_text()):
        assert "ValueError" in page
        assert LONG not in page
        assert "cannot reach" in page


def test_with_debug_on_a_failing_request_shows_no_secret_of_the_settings(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Django's filter knows `SECRET_KEY` by its name, and not the password in `DATABASE_URL`."""
    monkeypatch.setenv("PLANTED", json.dumps({"url": f"{LONG}-of-a-vendor"}))
    settings.DEBUG = True
    settings.ROOT_URLCONF = "tests.secrets.urls"
    settings.DATABASE_URL = f"postgresql://user:{LONG}@db/name"
    settings.CELERY_BROKER_URL = f"amqp://user:{LONG}@broker//"
    client = Client(raise_request_exception=False)
    client.cookies["sessionid"] = client.cookies["csrftoken"] = LONG
    answer = client.get("/boom", headers={"authorization": f"Bearer {LONG}"})
    page = answer.content.decode()
    assert answer.status_code == 500
    assert "CELERY_BROKER_URL" in page  # the page of DEBUG, with all settings
    assert "vendor.example" in page
    assert LONG not in page
    assert settings.SECRET_KEY not in page
