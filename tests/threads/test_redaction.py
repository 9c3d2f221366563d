"""What is known as a secret, by its value or its form, is masked; what is a word stays."""

from __future__ import annotations

import base64
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
        f"Authorization: Token {LONG}",
        f"Authorization: {LONG}",
        f"a header Bearer {LONG}1 was sent",
        f"Incorrect API key provided: {LONG}. Look at your keys.",
        f"host=db password={LONG} user=x",
        f'password="two {LONG}" user=x',
        f"{{'password': 'it\\'s {LONG}'}}",
        f'{{\\"password\\": \\"two {LONG}\\"}}',
        f"&#x27;password&#x27;: &#x27;{LONG}&#x27;, &#x27;user&#x27;: &#x27;x&#x27;",
        f"&quot;api_key&quot;: &quot;two {LONG}&quot;",
        f"redis://:ab/{LONG}@cache/0",
        f"amqp://user:ab/{LONG}@rabbit//",
        f"AccountName=x;AccountKey={LONG}==;EndpointSuffix=y",
        f"private_key: {LONG}",
        f"access_key: '{LONG}'",
        f"/x?a=1&amp;apiToken={LONG}&amp;b",
        f"/callback?code={LONG}",
        f"/x?user_password={LONG}",
        f"{{'Set-Cookie': 'a={LONG}; b={LONG}'}}",
        f"rk_live_{LONG}",
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
        'duplicate key value violates "pk_orders_customer_id", "pk_orders_by_customer_2024_01" or "rk_matrix_one"',
        "no item sk-10023-blue",
        "Basic Python3Course and basic Arithmetic2 courses",
        "cookie: chocolate, cookies=oatmeal; a cookie: 'vanilla'",
        "GET /x?code=42&postcode=SW1A2AA&author=Austen2&compass=north&keyword=lamp&monkey=bonobo&designer=Eames",
        "https://docs.example/?keywords=token&max_tokens=400&token_type=bearer#pass",
        "http://cache.example:8080/people/@ada and http://[::1]:80/@ada",
        "the token Python3 is unexpected",
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
    settings.DATABASE_COPY = "postgresql://shop:hunterhunter@db/x"
    assert redact("hunterhunter; hunterhunters") == "[masked]; hunterhunters"


def test_a_password_that_is_a_word_of_many_lines_stays(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.DATABASE_COPY = "postgresql://postgres:postgres@db/x"
    settings.OTHER_URL = "postgresql://bookshop:bookshop@db/x"
    settings.THIRD_URL = "postgresql://x:warehouse@db/warehouse"
    settings.COPIES = {"default": {"USER": "garden-shop", "PASSWORD": "garden-shop", "NAME": "x"}}
    monkeypatch.setenv("FLOWER_PASSWORD", "changeme")
    redaction._values.cache_clear()
    text = "postgres bookshop warehouse garden-shop: changeme"
    assert redact(text) == text
    assert redact(settings.DATABASE_COPY) == "postgresql://postgres:[masked]@db/x"


def test_a_setting_that_only_speaks_of_secrets_holds_none(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "OPENAI_API_VERSION": "2024-10-21",
        "KEYCLOAK_REALM": "production",
        "KEYCLOAK_SERVER": "identity-of-all-our-people-2",
        "AUTH_MODE": "required",
        "AUTH": "disabled-for-all",
        "SESSION_COOKIE_DOMAIN": "example.com",
        "API": "internal",
        "AUTH_HOST": "login2.example.com",
        "AUTH_LOGIN": "Interactive2",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings.SIMPLE_JWT = {
        "TOKEN_TYPE_CLAIM": "token_type",
        "TOKEN_OBTAIN_SERIALIZER": "rest_framework_simplejwt.serializers.TokenObtainPairSerializer",
        "AUTH_TOKEN_CLASSES": ("rest_framework_simplejwt.tokens.AccessToken",),
        "SIGNING_KEY": "signed-with-this-one",
    }
    settings.OAUTH2_PROVIDER = {"SCOPES": {"read": "Read what is there", "write_token": "Write what is there"}}
    redaction._values.cache_clear()
    text = " ".join([*variables.values(), "token_type", "Read what is there", "Write what is there"])
    text += (
        " rest_framework_simplejwt.serializers.TokenObtainPairSerializer rest_framework_simplejwt.tokens.AccessToken"
    )
    assert redact(text) == text
    assert redact("x signed-with-this-one x") == "x [masked] x"


def test_what_stands_below_a_name_that_says_so_is_meant(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.VENDOR_API_KEYS = {"parcels": "parcels-4711", "host": "parcels.example2.com", "mails": ["Mailing-Key"]}
    settings.SHORT_TOKEN = "onlyletters"
    monkeypatch.setenv("STRIPE_API_KEY_2", "stripes-of-2")
    redaction._values.cache_clear()
    told = redact("parcels-4711 parcels.example2.com Mailing-Key onlyletters stripes-of-2")
    assert told == "[masked] parcels.example2.com [masked] [masked] [masked]"


def test_basic_credentials_are_masked_where_they_are_some() -> None:
    said = base64.b64encode(b"ada:lovelace").decode()
    assert redact(f"a header Basic {said} was sent") == "a header Basic [masked] was sent"


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
    pieces = ["a", "key=", "://:", "token ", "eyJ", "passwd-", "eyJ-", "\n", "?a", "token" + " " * 500]
    pieces += [
        "sk-",
        "sk-1",
        "pk_a1b-",
        "password='",
        'password=\\"',
        "pwd:&quot;",
        "cookie:a=",
        "a=b;",
        "&a=",
        "basic a",
    ]
    pieces += ["a://b:", "?" + "a" * 79]
    began = time.process_time()
    for piece in pieces:
        redact(piece * (30_000 // len(piece)))
    assert time.process_time() - began < 4  # seconds; 0.2 on an idle machine, minutes for a careless pattern


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
