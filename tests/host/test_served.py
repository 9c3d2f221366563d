"""The shop's API of runs, under its prefix, beside the shop's own, by ASGI and by WSGI."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from tests.host.host import Host, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def keys(adopted: Host) -> dict[str, str]:
    """A key of an admin, and one of a customer."""
    asked = """
import io
from django.core.management import call_command
said = {}
for name in ("boss", "ann"):
    call_command("create_api_key", user=f"{name}@shop.example", stdout=(out := io.StringIO()))
    said[name] = out.getvalue().split()[-1]
print(json.dumps(said))
"""
    found: dict[str, str] = adopted.told(asked)
    return found


@pytest.fixture(scope="module")
def web(adopted: Host) -> Iterator[httpx2.Client]:
    command = "uvicorn shop.asgi:application --port PORT --no-access-log --timeout-graceful-shutdown 5"
    with adopted.serving("uvicorn", command) as client:
        yield client


@pytest.fixture(scope="module")
def plain(adopted: Host) -> Iterator[httpx2.Client]:
    with adopted.serving("wsgi", "python manage.py runserver PORT --noreload --insecure") as client:
        yield client


def bearer(keys: dict[str, str], name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {keys[name]}"}


def started(client: httpx2.Client, headers: dict[str, str], text: str = "Where is order 1042?") -> httpx2.Response:
    answer = client.post("/ai/api/runs", json={"agent": "support", "input": text}, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer


def test_a_run_over_http_under_the_prefix(web: httpx2.Client, keys: dict[str, str]) -> None:
    ann = bearer(keys, "ann")
    answer = started(web, ann)
    run = answer.headers["Location"]
    assert run == f"/ai/api/runs/{answer.json()['id']}"
    assert answer.headers["X-Shop"] == "1", "the shop's middleware sees it"
    done = web.get(f"{run}/wait?timeout_seconds=30", headers=ann).json()
    assert (done["status"], done["output"]) == ("completed", "Order 1042 is shipped.")
    events = web.get(f"{run}/events", headers=ann).json()
    stream = web.get(f"{run}/stream", headers=ann).text
    seqs = [int(line.removeprefix("id: ")) for line in stream.splitlines() if line.startswith("id: ")]
    assert seqs == [event["seq"] for event in events["results"]] == list(range(1, len(seqs) + 1))
    # And a list's next page is where the list is
    page = web.get("/ai/api/runs?limit=1", headers=bearer(keys, "boss")).json()
    assert len(page["results"]) == 1, "the shop's PAGE_SIZE and LimitOffsetPagination are its own"


def test_a_run_that_is_streamed_from_its_start(web: httpx2.Client, keys: dict[str, str]) -> None:
    body = {"agent": "support", "input": "Where is order 1042?", "stream": True}
    with web.stream("POST", "/ai/api/runs", json=body, headers=bearer(keys, "ann")) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    assert "event: run.completed" in text


def test_a_customer_sees_their_own(web: httpx2.Client, keys: dict[str, str]) -> None:
    ann, boss = bearer(keys, "ann"), bearer(keys, "boss")
    run = started(web, boss).headers["Location"]
    assert web.get(run, headers=ann).status_code == 404
    assert web.get(run, headers=boss).status_code == 200
    own = {each["id"] for each in web.get("/ai/api/runs?limit=200", headers=ann).json()["results"]}
    assert run.rpartition("/")[2] not in own


def test_a_view_that_breaks_takes_its_run_back_and_one_that_does_not_sends_it(
    adopted: Host, web: httpx2.Client
) -> None:
    count = "SELECT count(*) FROM longhaul_runs_run"
    before = adopted.rows(count)
    assert web.get("/orders/ask/?number=77").status_code == 500
    assert adopted.rows(count) == before
    assert adopted.rows("SELECT count(*) FROM orders_order WHERE number = 77") == [(0,)]
    run = web.get("/orders/ask/?number=78&mail=ann@shop.example").json()["run"]
    status = "SELECT status FROM longhaul_runs_run WHERE id = %s"
    until(lambda: adopted.rows(status, run) == [("completed",)], "it was sent after the commit")


def test_the_shops_own_api_keeps_its_ways_and_ours_has_none_of_them(web: httpx2.Client, keys: dict[str, str]) -> None:
    # The shop's: in an envelope, errors in its own words, for staff only
    theirs = web.get("/orders/", headers={"Accept": "application/json; version=shop-1"})
    assert (theirs.status_code, list(theirs.json()["shop"])) == (403, ["oops"])
    # Ours
    nobody = web.get("/ai/api/runs", headers={"Accept-Language": "de"})
    assert nobody.status_code == 401
    assert nobody.json()["errors"][0]["code"] == "not_authenticated"
    for _ in range(3):  # the shop lets a stranger in once a day
        assert web.get("/ai/api/agents", headers=bearer(keys, "ann")).status_code == 200
    missing = web.get("/ai/api/runs/none", headers=bearer(keys, "ann"))
    assert (missing.status_code, missing.json()["errors"][0]["code"]) == (404, "not_found")
    assert web.get("/nothing").json() == {"shop": "there is no such page"}


def test_the_page_and_the_document_of_the_api_know_their_prefix(web: httpx2.Client) -> None:
    page = web.get("/ai/api/docs")
    assert page.status_code == 200
    assert '"/ai/api/docs/swagger-ui.css"' in page.text
    assert '"/ai/api/schema"' in web.get("/ai/api/docs/start.js").text
    paths = web.get("/ai/api/schema").json()["paths"]
    assert "/ai/api/runs/{id}/wait" in paths
    assert all(path.startswith("/ai/") for path in paths), "the shop's own are not in it"


def test_it_is_ready(web: httpx2.Client) -> None:
    ready = until(lambda: (found := web.get("/ai/readyz")).status_code == 200 and found, "ready")
    assert ready.json()["ready"] is True


def test_wsgi_serves_all_but_streams_and_says_what_to_do(plain: httpx2.Client, keys: dict[str, str]) -> None:
    ann = bearer(keys, "ann")
    run = started(plain, ann).headers["Location"]
    done = plain.get(f"{run}/wait?timeout_seconds=30", headers=ann).json()
    assert (done["status"], done["output"]) == ("completed", "Order 1042 is shipped.")
    assert plain.get(f"{run}/events", headers=ann).json()["results"][-1]["type"] == "run.completed"
    refused = plain.get(f"{run}/stream", headers=ann)
    assert refused.status_code == 501
    assert f"wait for the run at {run}/wait" in refused.json()["errors"][0]["detail"]
    body = {"agent": "support", "input": "Where is order 1042?", "stream": True}
    refused = plain.post("/ai/api/runs", json=body, headers=ann)
    assert refused.status_code == 501
    assert "wait for the run at /ai/api/runs/{id}/wait" in refused.json()["errors"][0]["detail"]


def test_a_wait_by_wsgi_has_an_end(plain: httpx2.Client, keys: dict[str, str]) -> None:
    ann = bearer(keys, "ann")
    run = started(plain, ann, "speak slowly").headers["Location"]
    waited = plain.get(f"{run}/wait?timeout_seconds=0.5", headers=ann)
    assert waited.json()["status"] in ("queued", "running")
    assert waited.elapsed.total_seconds() < 5
    plain.post(f"{run}/cancel", json={}, headers=ann)


ADMIN = """
from django.apps import apps
from django.contrib import admin
from django.test import Client
from django.urls import reverse
from customers.models import Customer
client = Client()
client.force_login(Customer.objects.get(email="boss@shop.example"))
found = {}
for model in admin.site._registry:
    if model._meta.app_label.startswith("longhaul"):
        name = f"{model._meta.app_label}_{model._meta.model_name}"
        pages = [reverse(f"admin:{name}_changelist")]
        row = model._default_manager.first()
        if row is not None:
            pages.append(reverse(f"admin:{name}_change", args=[row.pk]))
        found |= {page: client.get(page).status_code for page in pages}
for page in ("/admin/", "/admin/longhaul_runs/", "/admin/orders/order/", "/admin/customers/customer/"):
    found[page] = client.get(page).status_code
print(json.dumps(found))
"""


def test_the_admin_shows_all_of_it_with_a_user_of_another_kind(adopted: Host, keys: dict[str, str]) -> None:
    found: dict[str, int] = adopted.told(ADMIN)
    assert len(found) > 12
    assert {page: status for page, status in found.items() if status != 200} == {}


BELOW = """
from django.test import Client
from django.urls import set_script_prefix
client = Client(headers={"Authorization": "Bearer KEY"})
body = {"agent": "support", "input": "Where is 1042?"}
set_script_prefix("/shop/")
try:
    started = client.post("/ai/api/runs", body, content_type="application/json")
    page = client.get("/ai/api/docs").content.decode()
    paths = client.get("/ai/api/schema").json()["paths"]
finally:
    set_script_prefix("/")
print(json.dumps([started.headers["Location"], "/shop/ai/api/docs/start.js" in page, sorted(paths)[0]]))
"""


def test_a_script_name_stands_before_all_addresses(adopted: Host, keys: dict[str, str]) -> None:
    location, page, path = adopted.told(BELOW.replace("KEY", keys["ann"]))
    assert location.startswith("/shop/ai/api/runs/")
    assert page
    assert path.startswith("/shop/ai/api/")


LIMITED = """
from django.conf import settings
from django.test import Client, override_settings
with override_settings(LONGHAUL={**settings.LONGHAUL, "API_RATE": "2/d"}):
    print(json.dumps([
        Client(headers={"Authorization": f"Bearer {key}"}).get("/ai/api/agents").status_code for key in KEYS
    ]))
"""


def test_a_rate_counts_by_key(adopted: Host, keys: dict[str, str]) -> None:
    said = adopted.told(LIMITED.replace("KEYS", repr([keys["ann"]] * 3 + [keys["boss"]])))
    assert said == [200, 200, 429, 200]


@pytest.mark.parametrize("adopted", ["5.2"], indirect=True)
def test_streams_need_no_line_in_asgi(adopted: Host, keys: dict[str, str]) -> None:
    bare = (adopted.folder / "shop" / "wsgi.py").read_text().replace("wsgi", "asgi")
    (adopted.folder / "shop" / "bare.py").write_text(bare)
    with adopted.serving("bare", "uvicorn shop.bare:application --port PORT --no-access-log") as client:
        run = started(client, bearer(keys, "ann")).headers["Location"]
        assert "event: run.completed" in client.get(f"{run}/stream", headers=bearer(keys, "ann")).text
