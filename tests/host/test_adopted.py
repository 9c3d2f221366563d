"""The shop goes on as it was, and has an agent."""

from __future__ import annotations

import re

import psycopg
import pytest
import redis

from tests.host.conftest import CONFIGURATION
from tests.host.host import Host, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHIP = "from orders.tasks import ship; print(json.dumps(ship.delay(1042).get(timeout=30)))"
once = pytest.mark.parametrize("adopted", ["5.2"], indirect=True)  # what does not depend on Django's version


# --- the shop's own -------------------------------------------------------------------------------------------------


def test_what_the_shop_says_of_its_own_tasks_counts_for_them_as_before(adopted: Host) -> None:
    assert "task_time_limit 5" in adopted.before
    assert adopted.python(CONFIGURATION) == adopted.before


def test_its_task_runs_in_its_worker_and_its_result_is_stored(adopted: Host) -> None:
    assert adopted.told(SHIP) == {"queue": "shop", "acks_late": False, "time_limit": 5, "worker": "shop@shop"}


def test_each_worker_takes_its_own_queue_and_reserves_what_it_was_told(adopted: Host) -> None:
    said = adopted.told(
        """
from shop.celery import app
inspect = app.control.inspect(timeout=5, limit=4)
queues = {name: [queue["name"] for queue in found] for name, found in inspect.active_queues().items()}
prefetched = {name: found["prefetch_count"] for name, found in inspect.stats().items()}
print(json.dumps({name: [queues[name], prefetched[name]] for name in queues}))
""",
    )
    assert said == {
        "shop@shop": [["shop"], 4],  # one place, times the shop's multiplier
        "agents@shop": [["longhaul.agents"], 100],
        "tools@shop": [["longhaul.tools"], 2],
        "control@shop": [["longhaul.control"], 2],
    }


@once
def test_its_limit_stops_its_own_task_and_its_early_acknowledgement_is_early(adopted: Host) -> None:
    task = adopted.told("from orders.tasks import take_long; print(json.dumps(take_long.delay(30).id))")
    result = f"from shop.celery import app\nresult = app.AsyncResult({task!r})\n"
    until(lambda: adopted.told(f"{result}print(json.dumps(result.state))") == "STARTED", "the task has begun")
    with redis.Redis.from_url(adopted.shell["REDIS_URL"]) as broker:
        assert [each for each in broker.hvals("unacked") if task.encode() in each] == []
    said = adopted.python(f"{result}result.get(timeout=30, propagate=False)\nprint(repr(result.result))")
    assert "SoftTimeLimitExceeded" in said


@once
def test_checks_of_a_deployment_name_what_the_shop_itself_set(adopted: Host) -> None:
    said = adopted.run("python manage.py check --deploy --database default --database archive")
    ids = set(re.findall(r"\((\w+)\.[EWI]\d+\)", said))
    assert ids == {"security"}, said


# --- runs in it -----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_when_its_worker_is_killed_and_no_limit_of_the_shops_tasks_ends_it(adopted: Host) -> None:
    # Given a run whose model speaks for longer than a task of the shop may take
    run = adopted.told(
        "from orders.agents import support; print(json.dumps(str(support.start('speak slowly').id)))",
    )
    deltas = "SELECT count(*) FROM longhaul_runs_event WHERE run_id = %s AND type = 'text.delta'"
    until(lambda: adopted.rows(deltas, run)[0][0] > 3, "it speaks")
    # When its worker is killed in the middle
    adopted.kill("agents")
    adopted.start("agents", adopted.commands["agents"])
    # Then another life of it speaks on, to the end
    row = "SELECT status, stop_reason FROM longhaul_runs_run WHERE id = %s"
    until(lambda: adopted.rows(row, run)[0] == ("completed", "end_turn"), "it completes")
    took = "SELECT reason, extract(epoch FROM ended_at - started_at)::float FROM longhaul_runs_leg WHERE run_id = %s"
    legs = adopted.rows(f"{took} ORDER BY number", run)
    assert [reason for reason, _ in legs] == ["lost", "finished"]
    assert legs[1][1] > 5, "longer than the shop's task_time_limit"
    verify = f'from django.core.management import call_command\ncall_command("check_runs")\ncall_command("replay_run", {run!r}, verify=True)'
    said = adopted.python(verify)
    assert "no invariant violated" in said
    assert "no difference" in said


def test_runs_start_with_the_transaction_that_they_are_started_in(adopted: Host) -> None:
    before = adopted.rows("SELECT count(*) FROM longhaul_runs_run")
    said = adopted.told(
        """
from django.db import transaction
from orders.agents import support
from orders.models import Order
try:
    with transaction.atomic():
        Order.objects.create(number=5)
        support.start("Where is order 5?")
        raise RuntimeError
except RuntimeError:
    pass
with transaction.atomic():
    run = support.start("refund order 1042")
    inside = run.status
run.wait(timeout_seconds=60)
print(json.dumps([Order.objects.filter(number=5).exists(), inside, run.status, run.output]))
""",
    )
    assert said == [False, "queued", "completed", "Order 1042 is refunded."]
    assert adopted.rows("SELECT count(*) FROM longhaul_runs_run") == [(before[0][0] + 1,)]
    assert adopted.rows("SELECT cents FROM orders_refund")[-1] == (500,)


@once
def test_one_worker_may_consume_the_shops_queue_and_the_tools(adopted: Host) -> None:
    adopted.end("tools", "shop")
    adopted.start("both", "celery -A shop worker -Q shop,longhaul.tools -P prefork -c 2 -n both@shop")
    adopted.present("both")
    assert adopted.told(SHIP)["worker"] == "both@shop"
    assert "| Order 1042 is shipped." in adopted.run('python manage.py run_agent support "Where is 1042?" --follow')
    stats = "from shop.celery import app\nprint(json.dumps(app.control.inspect(['both@shop'], timeout=5).stats()))"
    assert adopted.told(stats)["both@shop"]["prefetch_count"] == 8, "what the shop says counts for its queues"
    adopted.end("both")
    for name in ("tools", "shop"):
        adopted.start(name, adopted.commands[name])
    adopted.present("tools")


def test_the_archive_holds_nothing_of_it_and_nobody_has_asked_it(adopted: Host) -> None:
    archive = adopted.database_url.replace(adopted.shell["SHOP_DATABASE"], adopted.shell["SHOP_ARCHIVE_DATABASE"])
    asked = adopted.run("python manage.py migrate --database archive")
    assert "longhaul_runs.0001_initial... OK" in asked  # as marked, and made nothing
    with psycopg.connect(archive, autocommit=True) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        functions = connection.execute("SELECT proname FROM pg_proc WHERE proname LIKE 'longhaul%'").fetchall()
        others = connection.execute(
            "SELECT application_name FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'"
        ).fetchall()
    assert {name for (name,) in tables} == {"archive_oldorder", "django_migrations"}
    assert functions == []
    assert others == []
