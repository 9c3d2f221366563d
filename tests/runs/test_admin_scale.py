"""The admin's pages at 100,000 runs and 1,000,000 events: how many queries they make, and how many rows these read.

No wall times: each query that a page made is explained afterwards, and the rows are counted that its scans touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.urls import reverse

from runs.models import Event, Leg, Run, Step, Usage
from tests.runs.test_admin import list_of, page_of
from threads.admin.listing import MOST, WINDOW
from threads.models import Message, Thread
from tools.models import ToolAttempt, ToolCall, Worker

RUNS = 100_000
LONG = 50_000  # events of the longest run
OWNERS = 1_000

# Ids as UUIDv7 are: the time in ms first. One row a second, the last one now.
ID = (
    "(lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - ({runs} - {n}) * 1000::bigint), 12, '0')"
    " || '7{kind}008000' || lpad(to_hex({n}), 12, '0'))::uuid"
)
# One live run in 1,000, one failed in 500, the rest completed.
STATUS = (
    "CASE WHEN n % 1000 = 7 THEN 'waiting' WHEN n % 1000 = 8 THEN 'queued' WHEN n % 1000 = 9 THEN 'requires_action'"
    " WHEN n % 500 = 3 THEN 'failed' ELSE 'completed' END"
)
LOAD = """
INSERT INTO auth_user (username, password, is_superuser, is_staff, is_active, first_name, last_name, email, date_joined)
SELECT 'user' || n, '', false, false, true, '', '', '', now() FROM generate_series(1, {owners}) n;

INSERT INTO longhaul_threads_thread (id, owner_id, agent, title, summary, metadata, overrides)
SELECT {thread}, (SELECT min(id) FROM auth_user WHERE username = 'user1') + n % {owners}, '', 'Order ' || n, '', '{{}}', '{{}}'
FROM generate_series(1, {runs}) n;

INSERT INTO longhaul_runs_run (id, thread_id, owner_id, agent, status, stop_reason, origin, depth, busy, priority, overrides,
    save_mode, metadata, fingerprint, epoch, dispatch_seq, publishes, last_seq, steps, legs, lost, bad_calls, model_tries,
    input_tokens, output_tokens, cost)
SELECT {run}, {thread}, (SELECT min(id) FROM auth_user WHERE username = 'user1') + n % {owners}, 'agent' || n % 7, {status},
    CASE {status} WHEN 'completed' THEN 'end_turn' WHEN 'failed' THEN 'deadline' ELSE '' END, 'start', 0, 'enqueue', 0, '{{}}',
    'prompt_and_output', '{{}}', '', 1, 1, 1, CASE n WHEN {runs} THEN {long} ELSE 10 END, 1, 1, 0, 0, 0, 0, 0, 0
FROM generate_series(1, {runs}) n;

INSERT INTO longhaul_threads_message (id, thread_id, run_id, step, role, status, position, content, metadata, client_id, shown)
SELECT {message}, {thread}, {run}, 1, 'assistant', 'completed', 1, '[{{"type": "text", "text": "Done."}}]', '{{}}', '', true
FROM generate_series(1, {runs}) n;

INSERT INTO longhaul_runs_leg (id, run_id, number, epoch, worker_id, worker, task_id, reason, ended_at)
SELECT {leg}, {run}, 1, 1, {leg}, 'agents@a', 'x', 'finished', now() FROM generate_series(1, {runs}) n;

INSERT INTO longhaul_runs_step (id, run_id, number, leg_id, epoch, message_id, model, instructions, tool_names, schema_digest,
    options, context)
SELECT {step}, {run}, 1, {leg}, 1, {message}, 'scripted:x', '', '[]', '', '{{}}', '{{"pinned": [], "first": 1, "last": 1, "skipped": []}}'
FROM generate_series(1, {runs}) n;

INSERT INTO longhaul_runs_usage (id, run_id, step, epoch, message_id, model, input_tokens, output_tokens, cached_tokens,
    reasoning_tokens, discarded)
SELECT {usage}, {run}, 1, 1, {message}, 'scripted:x', 1, 1, 0, 0, false FROM generate_series(1, {runs}) n;

INSERT INTO longhaul_tools_toolcall (id, run_id, message_id, step, index, name, arguments, status, outcome, attempt, max_attempts,
    idempotency_key, atomic, deferred, timeout, queue, publishes)
SELECT {call}, {run}, {message}, 1, 0, 'tool' || n % 9, '{{}}', 'settled', CASE n % 500 WHEN 3 THEN 'failed' ELSE 'success' END,
    1, 1, 'k' || n, false, false, '1 minute', '', 1
FROM generate_series(1, {runs}) n;

INSERT INTO longhaul_tools_toolattempt (id, call_id, number, worker_id, task_id, outcome, ended_at)
SELECT {attempt}, {call}, 1, {leg}, 'x', 'success', now() FROM generate_series(1, {runs}) n;

INSERT INTO longhaul_tools_worker (id, name, kind, host, pid, lock_key, draining, gone_at)
SELECT {leg}, 'agents@' || n, 'agents', 'host', n, n, false, CASE WHEN n > 10 THEN now() END FROM generate_series(1, 5000) n;

INSERT INTO longhaul_runs_event (run_id, seq, type, at, payload)
SELECT {run}, seq, CASE WHEN seq = 10 THEN 'run.completed' ELSE 'text.delta' END, now(), '{{"text": "word"}}'
FROM generate_series(1, {runs} - 1) n, generate_series(1, 10) seq;

INSERT INTO longhaul_runs_event (run_id, seq, type, at, payload)
SELECT {run}, seq, CASE WHEN seq % 1000 = 0 THEN 'leg.ended' ELSE 'text.delta' END, now(), '{{"text": "word"}}'
FROM (SELECT {runs} AS n) last, generate_series(1, {long}) seq;
"""
KINDS = ("thread", "run", "message", "leg", "step", "usage", "call", "attempt")


def load() -> None:
    """Fill the tables by INSERT ... SELECT: the triggers and defaults of the columns count, Python does not."""
    ids = {kind: ID.format(runs=RUNS, n="n", kind=place) for place, kind in enumerate(KINDS)}
    names = {**ids, "runs": RUNS, "owners": OWNERS, "long": LONG, "status": STATUS}
    with connection.cursor() as cursor:
        for statement in LOAD.format(**names).split(";\n"):
            if statement.strip():
                cursor.execute(statement)
        for model in (User, Thread, Run, Message, Leg, Step, Usage, ToolCall, ToolAttempt, Worker, Event):
            cursor.execute(f"ANALYZE {model._meta.db_table}")
        # After ANALYZE: a check that was planned for an empty table reads all of it for each row.
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")


@contextmanager
def queries() -> Iterator[list[tuple[str, Any]]]:
    """Note each SELECT with its parameters, as it was sent."""
    seen: list[tuple[str, Any]] = []

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append((sql, params))
        return execute(sql, params, many, context)

    with connection.execute_wrapper(note):
        yield seen


def rows_read(sql: str, params: Any) -> int:
    """Run the query once more and count the rows that its scans touched, those that a filter removed too."""
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {sql}", params)
        found = cursor.fetchone()[0]
    [plan] = json.loads(found) if isinstance(found, str) else found
    return _touched(plan["Plan"])


def _touched(node: dict[str, Any]) -> int:
    own = 0
    if "Scan" in node["Node Type"] and node["Node Type"] != "Bitmap Heap Scan":
        removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
        own = round((node["Actual Rows"] + removed) * node["Actual Loops"])
    return own + sum(_touched(each) for each in node.get("Plans", []))


def look(client: Client, url: str, *, at_most: int, rows: int) -> str | None:
    """Get a page. Returns what is wrong: more queries, or more rows read by one of them, than said."""
    with queries() as seen:
        answer = client.get(url)
    if answer.status_code != 200:
        return f"{url}: {answer.status_code}"
    selects = [(sql, params) for sql, params in seen if sql.startswith("SELECT")]
    if len(selects) > at_most:
        return f"{url}: {len(selects)} queries, {at_most} expected\n" + "\n".join(sql[:150] for sql, _ in selects)
    for sql, params in selects:
        touched = rows_read(sql, params)
        if touched > rows:
            return f"{url}: {touched} rows read, {rows} expected, by {sql}"
    return None


LIST = 3 * MOST  # the rows that are counted or passed over, with the threads and owners that are joined to them
FILTERED = 2 * WINDOW + LIST


@pytest.mark.slow
@pytest.mark.django_db
@pytest.mark.timeout(600)  # 1,000,000 events are loaded
def test_no_page_reads_more_than_a_bounded_number_of_rows(admin_client: Client) -> None:
    load()
    assert Run.objects.count() == RUNS
    assert Event.objects.count() >= 1_000_000
    latest, oldest = Run.objects.order_by("-pk").first(), Run.objects.order_by("pk").first()
    assert latest is not None
    assert oldest is not None
    call, thread = ToolCall.objects.first(), oldest.thread
    assert call is not None
    models: list[Any] = [Run, Thread, Message, Leg, Step, Usage, Event, ToolCall, ToolAttempt, Worker]
    wrong = []
    # 2 for the session and the user; then the count and the rows
    for model in models:
        wrong.append(look(admin_client, list_of(model), at_most=4, rows=LIST))
        wrong.append(look(admin_client, list_of(model, p=MOST // 50), at_most=4, rows=LIST))
    # an index: no look for the window
    middle = Run.objects.order_by("pk")[RUNS // 2].pk
    by_index: list[tuple[Any, dict[str, Any]]] = [
        (Run, {"before": middle}),
        (Run, {"thread": thread.pk}),
        (Run, {"status": "waiting"}),
        (Run, {"status": "queued"}),
        (Run, {"status": "requires_action"}),
        (Run, {"status": "running"}),
        (Run, {"status": "held"}),
        (Run, {"status": "live"}),
        (Run, {"created": "hour"}),
        (Event, {"run": latest.pk}),
        (Event, {"run": latest.pk, "before": LONG // 2}),
        (Event, {"before": Event.objects.order_by("pk")[500_000].pk}),
        (Message, {"run": oldest.pk}),
        (Message, {"thread": thread.pk}),
        (ToolCall, {"run": oldest.pk}),
        (ToolAttempt, {"call": call.pk}),
        (Leg, {"run": oldest.pk}),
        (Step, {"run": oldest.pk}),
        (Usage, {"run": oldest.pk}),
    ]
    for model, query in by_index:
        wrong.append(look(admin_client, list_of(model, **query), at_most=6, rows=LIST))
    # no index: the latest rows are looked at
    windowed: list[tuple[Any, dict[str, Any]]] = [
        (Run, {"status": "failed"}),
        (Run, {"status": "cancelled"}),
        (Run, {"status": "completed", "origin": "retry", "before": middle}),
        (Run, {"agent": "agent3"}),
        (Run, {"agent": "nobody"}),
        (Run, {"origin": "fork", "status": "waiting"}),
        (Event, {"type": "run.failed"}),
        (Event, {"type": "leg.ended", "run": latest.pk}),
        (ToolCall, {"outcome": "denied"}),
        (ToolCall, {"status": "unknown"}),
        (Message, {"role": "system"}),
        (Message, {"status": "partial"}),
        (Leg, {"reason": "lost"}),
        (Thread, {"archived": "yes"}),
        (Worker, {"state": "present", "kind": "tools"}),
    ]
    for model, query in windowed:
        wrong.append(look(admin_client, list_of(model, **query), at_most=7, rows=FILTERED))
    # a search: some ways to read the term, each by an index or in the window
    for term in (
        str(oldest.pk),
        str(oldest.pk)[:8],
        str(oldest.pk)[:4],
        str(thread.pk),
        "user77",
        "user",
        "agent3",
        "Order 99",
        "nothing",
    ):
        for model in models:
            wrong.append(look(admin_client, list_of(model, q=term), at_most=24, rows=FILTERED))
    # pages
    for row in (latest, oldest, thread, call, *(model.objects.order_by("pk").first() for model in models[2:])):
        wrong.append(look(admin_client, page_of(row), at_most=24, rows=LIST))
    wrong.append(look(admin_client, f"{page_of(latest)}?events_to=25000&steps_to=40", at_most=24, rows=LIST))
    wrong.append(
        look(admin_client, reverse("admin:longhaul_threads_thread_delete", args=[thread.pk]), at_most=10, rows=LIST)
    )
    wrong.append(look(admin_client, reverse("admin:longhaul_runs_agents"), at_most=4, rows=LIST))
    assert [each for each in wrong if each] == []
    _older_rows_are_reached(admin_client)
    _an_action_on_all_rows_takes_a_batch(admin_client)


def _older_rows_are_reached(admin_client: Client) -> None:
    # The link on the last page leads on, without a gap and without a row twice.
    seen: list[UUID] = []
    url = list_of(Run, p=MOST // 50)
    for _ in range(3):
        listing = admin_client.get(url).context["cl"]
        seen += [row.pk for row in listing.result_list]
        assert listing.older
        first = admin_client.get(list_of(Run) + listing.older)
        following = [row.pk for row in first.context["cl"].result_list]
        assert following[0] < seen[-1]
        newest_first = list(Run.objects.filter(pk__lte=seen[-1]).order_by("-pk").values_list("pk", flat=True)[:2])
        assert newest_first == [seen[-1], following[0]]
        url = list_of(Run) + listing.older + f"&p={MOST // 50}"


def _an_action_on_all_rows_takes_a_batch(admin_client: Client) -> None:
    # Every run is selected: a batch of the live ones is asked for, and no query read them all.
    data = {
        "action": "cancel_selected",
        "_selected_action": [str(Run.objects.first().pk)],  # type: ignore[union-attr]
        "select_across": "1",
    }
    with queries() as sent:
        answer = admin_client.post(list_of(Run), data)
    assert answer.status_code == 200
    assert len(answer.context["runs"]) == 100
    assert max(rows_read(sql, params) for sql, params in sent if sql.startswith("SELECT")) < FILTERED
