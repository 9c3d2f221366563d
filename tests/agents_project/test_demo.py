"""The demo: what it shows, what it claims, and that it leaves nothing running."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from agents_project import embedded
from agents_project.demo import source
from agents_project.demo.supervisor import DemoError, Supervisor
from agents_project.demo.verdict import Claim, Verdict, total_in
from agents_project.demo.view import DemoView, show_report, summarize
from agents_project.processes import Identity
from tests.processes import of_purpose

BEGIN = datetime(2026, 11, 21, 7, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("The total is 1275.", 1275),
        ("50 numbers were tested; the total is 1,275.", 1275),
        ("1, 2, 3 and so on: 1275", 1275),
        ("It is -5", -5),
        ("I do not know.", None),
        (None, None),
    ],
)
def test_the_total_is_the_last_number_of_the_answer(output: str | None, expected: int | None) -> None:
    assert total_in(output) == expected


def test_a_kill_and_the_recovery_from_it_are_told_in_words_and_times() -> None:
    # Given a run whose agents worker is killed after 2 s
    view = DemoView("r", agent="tester", since=BEGIN, expected=50)
    at = BEGIN + timedelta(seconds=2)
    told = view.killed("agents", "agents-1", 4711, at, "while it streamed step 13", "agents-3")
    # When events arrive: of a leg from before the kill, of the next one, of a later one
    for after in (1.99, 2.42, 6.0):
        moment = (BEGIN + timedelta(seconds=after)).isoformat()
        told += view.apply({"type": "leg.started", "at": moment, "leg": 2, "epoch": 4, "worker": "agents-2@host"})
    # Then the wait is told once
    assert told == [
        "    2.00 s  kill -9 agents-1 (process 4711) while it streamed step 13",
        "    2.00 s  agents-3 takes its place",
        "    1.99 s  leg 2 starts on agents-2",
        "    2.42 s  leg 2 starts on agents-2",
        "    2.42 s  the run goes on with agents-2, 420 ms after the kill",
        "    6.00 s  leg 2 starts on agents-2",
    ]


def test_a_tools_kill_is_over_when_a_call_starts_again() -> None:
    view = DemoView("r", agent="tester", since=BEGIN, expected=50)
    view.killed("tools", "tools-1", 4712, BEGIN, "in the middle of test_tool(number=30)", "tools-2")
    later = {"at": (BEGIN + timedelta(seconds=1)).isoformat(), "worker": "tools-2@host"}
    assert not [line for line in view.apply({"type": "leg.started", "leg": 2, **later}) if "after the kill" in line]
    started = {"type": "tool_call.started", "tool_call": "c", "name": "test_tool", "attempt": 2}
    assert view.apply({**started, **later})[-1].endswith("tools run again on tools-2, 1000 ms after the kill")


@pytest.mark.parametrize("width", [80, 120])
def test_a_kill_is_drawn_with_the_time_since_then_with_who_went_on(width: int) -> None:
    # Given a run whose holder is killed
    at = [BEGIN + timedelta(seconds=3.5)]
    view = DemoView("0" * 36, agent="tester", since=BEGIN, expected=50, clock=lambda: at[0])
    view.processes = {"agents-1": True, "agents-2": True, "tools-1": True, "control-1": False}
    leg = {"type": "leg.started", "leg": 1, "epoch": 1, "worker": "agents-1@host"}
    view.apply({**leg, "at": (BEGIN + timedelta(seconds=1)).isoformat()})
    assert "workers  agents-1 has the run  agents-2  tools-1  control-1 starts" in drawn(view, width)
    view.killed("agents", "agents-1", 4711, BEGIN + timedelta(seconds=3), "while it streamed step 13", "agents-3")
    # Then the time runs beside it, on a line that fits
    kill = "  3.0 s  kill -9 agents-1 while it streamed step 13"
    assert f"{kill}{'0.50 s ...':>{width - len(kill)}}" in drawn(view, width)
    at[0] += timedelta(seconds=1)
    assert f"{kill}{'1.5 s ...':>{width - len(kill)}}" in drawn(view, width)
    assert "workers  agents-2  tools-1  control-1 starts  agents-1 killed" in drawn(view, width)
    # Until another worker has the run
    view.apply({**leg, "leg": 2, "worker": "agents-2@host", "at": (BEGIN + timedelta(seconds=3.42)).isoformat()})
    assert f"{kill}{'on agents-2 after 420 ms':>{width - len(kill)}}" in drawn(view, width)
    assert any(line.startswith("workers  agents-2 has the run") for line in drawn(view, width))


def drawn(view: DemoView, width: int) -> list[str]:
    """Return the lines of a drawing on a terminal of 24 lines, which must fit."""
    console = Console(file=io.StringIO(), width=width, height=24, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(view)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert max(map(len, lines)) <= width
    assert len(lines) < 24
    return lines


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_the_claims_are_told_one_a_line_of_80_columns(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    claims = (Claim("one call a step, each settled once", True, "50 calls"), Claim("x" * 70, False, "it was not " * 2))
    figures = {"steps": 6, "legs": 2, "duration_s": 7.1, "report": "# Audit\n\n| a | b |\n|---|--:|\n| `c` | 1 |"}
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    show_report(console, Verdict(claims, figures))
    summarize(console, Verdict(claims, figures))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    if terminal:
        assert f"yes  one call a step, each settled once{'50 calls':>41}" in lines
        assert max(map(len, lines)) <= 80
        assert "6 steps in 2 legs, 7.1 s" in lines[-1]
    else:  # the report was told while it streamed
        assert lines[:3] == ["", "What the database says:", "  yes  one call a step, each settled once (50 calls)"]
        assert lines[3].startswith("  NO   xxx")


def test_a_second_demo_of_a_project_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    said = rf"runs already \(process {os.getpid()}\)"
    with Supervisor(print, folder=tmp_path), pytest.raises(DemoError, match=said), Supervisor(print, folder=tmp_path):
        pass
    with Supervisor(print, folder=tmp_path):
        pass  # the first one has ended


def test_what_a_killed_demo_left_is_ended_by_the_next_and_nothing_else(tmp_path: Path) -> None:
    # Given a demo that ended without its children, and a stranger
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    stranger = subprocess.Popen(sleeper)
    said: list[str] = []
    dead = Supervisor(print, folder=tmp_path)
    child = dead.children.start("agents-1", sleeper)
    try:
        # When the next one starts
        with Supervisor(said.append, folder=tmp_path):
            # Then the child is gone, named, and the stranger is not
            assert child.wait(timeout=5) == -signal.SIGKILL
            assert said == [f"ended what a killed earlier demo had left running (processes {child.pid})"]
            assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


# --- the demo itself -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_environment() -> Iterator[dict[str, str]]:
    """An environment in which `manage.py` has servers of its own, which are removed at the end."""
    purpose = embedded.reserve("test-demo")
    foreign = ("DATABASE_URL", "REDIS_URL", "CELERY_BROKER_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL")
    kept = {name: value for name, value in os.environ.items() if name not in (*foreign, "LONGHAUL_DEMO_MODEL")}
    yield {**kept, "LONGHAUL_PURPOSE": purpose}
    embedded.remove(purpose, force=True)


def manage(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "manage.py", *arguments],
        cwd=embedded.PROJECT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children_of(environment: dict[str, str]) -> list[Identity]:
    """Return the processes that the demo of this environment has recorded and that still run."""
    record = embedded.data_folder(environment["LONGHAUL_PURPOSE"]) / "demo" / "children.json"
    rows = json.loads(record.read_text())
    return [each for row in rows if (each := Identity(row["pid"], row["started"], row["command"])).alive()]


def workers_of(environment: dict[str, str]) -> list[Identity]:
    """Return what runs of the demo in this environment: prefork children too."""
    found = of_purpose(environment["LONGHAUL_PURPOSE"])
    return [each for each in found if "celery" in each.command or "agents_project.demo" in each.command]


@pytest.mark.slow
@pytest.mark.timeout(240)  # the first start makes a database cluster; the demo itself takes about 45 s
def test_the_main_job_survives_both_kills_and_says_so_in_one_line(demo_environment: dict[str, str]) -> None:
    # When the demo runs headless
    process = manage(demo_environment, "demo", "--once", "--json")
    out, err = process.communicate(timeout=200)
    # Then every claim holds, and stdout has one line of JSON
    assert process.returncode == 0, out + err
    figures = json.loads(out)
    assert out.count("\n") == 1
    assert list(figures) == [
        "status",
        "total",
        "steps",
        "legs",
        "legs_by_reason",
        "tool_calls",
        "tool_attempts",
        "ledger_rows",
        "kills",
        "discarded_messages",
        "pending_messages",
        "resumed_after_ms",
        "violations",
        "differences",
        "duration_s",
        "audit",
    ]
    assert figures["status"] == "completed"
    assert (figures["total"], figures["steps"], figures["tool_calls"], figures["ledger_rows"]) == (1275, 51, 50, 50)
    assert figures["legs_by_reason"]["budget"] >= 4
    assert sum(figures["legs_by_reason"].values()) == figures["legs"]
    assert figures["tool_attempts"] > 50
    assert (figures["kills"], len(figures["resumed_after_ms"])) == (2, 2)
    assert figures["discarded_messages"] >= 1
    assert (figures["pending_messages"], figures["violations"], figures["differences"]) == (0, 0, 0)
    # And the audit after it asked for several tools at once, which ran at once, and told real numbers
    audit = figures["audit"]
    assert (audit["status"], audit["package"]) == ("completed", "celery")
    assert audit["modules"] == len(source.find("celery").files)
    assert audit["most_asked_at_once"] >= 5
    assert audit["most_running_at_once"] >= 2
    assert audit["tool_calls"] == audit["tool_attempts"] == 24
    assert f"{audit['undocumented']:,} of {audit['public_names']:,} public names have none" in audit["report"]
    assert (audit["pending_messages"], audit["violations"], audit["differences"]) == (0, 0, 0)
    # And it told what happened, and left nothing running
    assert "kill -9 agents-" in err
    assert "kill -9 tools-" in err
    assert "\x1b" not in err
    assert not children_of(demo_environment)
    assert not workers_of(demo_environment)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_can_be_followed_afterwards_from_any_of_its_events(demo_environment: dict[str, str]) -> None:
    # Given the run of the demo, whose id a wrong one makes known
    _, told = manage(demo_environment, "follow_run", "nonsense").communicate(timeout=60)
    assert "There is no run 'nonsense'; there are:" in told
    run = told.splitlines()[-1].split()[0]
    # When it is followed as JSON
    lines, _ = manage(demo_environment, "follow_run", run, "--json").communicate(timeout=60)
    # Then it is all there
    events = [json.loads(line) for line in lines.splitlines()]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "run.completed"
    # And told from the middle on, it is the same end
    process = manage(demo_environment, "follow_run", run, "--after", str(len(events) - 20))
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert text.splitlines()[-1].endswith("run completed (end_turn)")
    assert "| The total is 1275." in text


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_demo_stays_up_for_own_runs_until_ctrl_c_which_ends_all_of_it(demo_environment: dict[str, str]) -> None:
    # Given a demo that stays up
    process = manage(demo_environment, "demo", "--job", "main", "--kill", "none")
    assert process.stdout is not None
    seen: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            seen.append(line)
            if "leg 1 starts" in line:
                ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(60), "".join(seen)
        # When another terminal starts a run against it
        job = "Test the test tool with the numbers 1-5, one after another, then give me the total."
        own = manage(demo_environment, "run_agent", "tester", job, "--follow")
        out, err = own.communicate(timeout=60)
        # Then it runs there to its end
        assert own.returncode == 0, out + err
        assert "| The total is 15." in out
        assert "No agents worker" not in err
        assert workers_of(demo_environment)
    finally:
        # And Ctrl-C ends all of it
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        err = process.stderr.read()
        process.wait(timeout=30)
        reader.join(timeout=5)
        process.stdout.close()
        process.stderr.close()
    assert process.returncode in (0, 130), "".join(seen) + err
    assert "Ended, with everything that was started." in seen[-1]
    assert not children_of(demo_environment)
    assert not workers_of(demo_environment)


@pytest.mark.parametrize("late", [False, True], ids=["before", "between look and bind"])
def test_a_taken_port_is_replaced_and_named(tmp_path: Path, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("agents_project.demo.supervisor.MODEL_PORT", port)
        if late:
            monkeypatch.setattr("agents_project.demo.supervisor.free_port", lambda preferred: preferred)
        said: list[str] = []
        with Supervisor(said.append, folder=tmp_path) as supervisor:
            supervisor.start_model()
            supervisor.await_model()
            assert said == [f"port {port} is taken; the model server listens at {supervisor.model_url}"]
            with urllib.request.urlopen(f"{supervisor.model_url}/models", timeout=10) as answer:
                assert answer.status == 200
