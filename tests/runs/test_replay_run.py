"""`replay_run`: a run played again, in its rhythm, faster or at once; and the comparison, as a shell sees it."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from django.core.management import call_command
from django.db import connection

from runs.agents import Agent
from runs.events import RunEvent
from runs.models import Event, Run
from runs.pytest_longhaul import ScriptedModel, call, run_to_end
from runs.terminal.player import Player
from tests.runs.scenes import Cast, add
from tests.runs.test_commands import ran

pytestmark = pytest.mark.django_db
ROOT = Path(__file__).parents[2]
BEGIN = datetime(2026, 11, 21, 7, 0, tzinfo=UTC)


@pytest.fixture
def agent(cast: Cast) -> Agent:
    return cast(tools=[add])


@pytest.fixture
def run(agent: Agent, scripted_model: ScriptedModel) -> Run:
    """A run that has ended, whose events came a tenth of a second apart, and a day before the last one."""
    scripted_model.say(["Let me see.", call("add", a=1, b=2)], "It is three.")
    run = run_to_end(agent.start("How much?"))
    for event in Event.objects.filter(run=run):
        late = timedelta(days=1) if event.seq == run.last_seq else timedelta()
        Event.objects.filter(pk=event.pk).update(at=run.created_at + event.seq * timedelta(seconds=0.1) + late)
    return run


# --- the player


def events(*after: float) -> list[RunEvent]:
    return [
        RunEvent(seq, "data", uuid4(), BEGIN + timedelta(seconds=seconds), {}) for seq, seconds in enumerate(after, 1)
    ]


@pytest.mark.parametrize("speed", [1.0, 4.0])
def test_events_come_in_the_rhythm_of_the_run_as_fast_as_asked(speed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def sleep(seconds: float, asleep: Callable[[float], None] = time.sleep) -> None:
        slept.append(seconds)
        asleep(seconds)

    monkeypatch.setattr("runs.terminal.player.time.sleep", sleep)
    began = time.monotonic()
    came = []
    for event in Player(events(0, 0.2, 0.2, 0.6), speed, pytest.fail):
        came.append(time.monotonic() - began)
        assert event.seq == len(came)
    for at, due in zip(came, (0, 0.2, 0.2, 0.6), strict=True):
        assert at >= due / speed - 0.001
    assert sum(slept) <= 0.6 / speed  # and no longer, however slow the machine is


def test_at_once_is_without_any_wait_and_says_nothing_of_pauses() -> None:
    began = time.monotonic()
    assert len(list(Player(events(0, 3600, 7200), 0, pytest.fail))) == 3
    assert time.monotonic() - began < 60


def test_a_long_pause_is_cut_and_said() -> None:
    told: list[str] = []
    began = time.monotonic()
    list(Player(events(0, 3600, 3600.1), 2, told.append, pause=timedelta(seconds=0.1)))
    assert 0.1 <= time.monotonic() - began < 60
    assert told == ["nothing happens for 60 min 0 s; 0.1 s of it are waited for"]


def test_what_comes_late_is_not_caught_up_by_haste() -> None:
    """A reader that was held up by its terminal goes on in the rhythm."""
    player = iter(Player(events(0, 0.1, 0.2, 0.3), 1, pytest.fail))
    next(player)
    time.sleep(0.5)  # a terminal that stood still
    next(player)
    began = time.monotonic()
    list(player)
    assert time.monotonic() - began >= 0.1


# --- the command


def test_a_run_is_played_as_it_was_told(run: Run) -> None:
    live = ran("follow_run", str(run.pk)).out
    at_once = ran("replay_run", str(run.pk)[-8:], "--speed", "0")
    assert (at_once.code, at_once.err, at_once.out) == (0, "", live)
    assert "| Let me see." in at_once.out
    # In its rhythm, the day before its end is cut, and said
    began = time.monotonic()
    slow = ran("replay_run", str(run.pk), "--speed", "20").out.splitlines()
    assert time.monotonic() - began > 2
    pause = [line for line in slow if "nothing happens for 1440 min 0 s; 2 s of it are waited for" in line]
    assert len(pause) == 1
    assert [line for line in slow if line not in pause] == live.splitlines()


def test_a_script_gets_the_events_at_once(run: Run) -> None:
    shown = ran("replay_run", str(run.pk), "--json")
    assert (shown.code, shown.err) == (0, "")
    assert shown.lines == [event.as_dict() for event in run.events()]


def test_a_run_that_failed_is_played_without_an_error(agent: Agent) -> None:
    run = agent.start("hello").cancel()
    assert ran("replay_run", str(run.pk), "--speed", "0").code == 0


@pytest.mark.django_db(transaction=True)
def test_a_live_run_goes_on_as_it_comes(agent: Agent) -> None:
    run = agent.start("hello")
    out = io.StringIO()

    def play() -> None:
        try:
            call_command("replay_run", str(run.pk), "--speed", "0", stdout=out)
        finally:
            connection.close()

    playing = threading.Thread(target=play, daemon=True)
    playing.start()
    until = time.monotonic() + 10
    while "is queued" not in out.getvalue():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert playing.is_alive()
    run.cancel("enough")
    playing.join(10)
    assert "run cancelled (cancelled): cancelled: enough" in out.getvalue()


def test_on_a_terminal_it_is_drawn(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    above, below = pty.openpty()
    heard = bytearray()

    def listen() -> None:
        try:
            while data := os.read(above, 65536):
                heard.extend(data)
        except OSError:
            return

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    with os.fdopen(below, "w", encoding="utf-8") as screen:
        call_command("replay_run", str(run.pk), "--speed", "50", stdout=screen)
    listening.join(5)
    os.close(above)
    drawn = heard.decode()
    assert "the model says" in drawn
    assert "It is three." in drawn
    assert "nothing happens for" in drawn


# --- the comparison


def test_the_comparison_of_a_sound_run_says_so(run: Run) -> None:
    assert ran("replay_run", str(run.pk), "--verify").out == (
        f"Run {run.pk}: {run.last_seq} events, no difference between the log and the tables.\n"
    )
    assert ran("replay_run", str(run.pk), "--verify", "--json").lines == [
        {"run": str(run.pk), "differences": [], "events": run.last_seq, "since": []}
    ]
    assert ran("replay_run", "--verify", "--all").out == (
        f"1 run, {run.last_seq} events: 0 differences between the log and the tables.\n"
    )


def test_each_difference_is_told_and_ends_with_1(run: Run, agent: Agent) -> None:
    other = agent.start("hello")
    other.refresh_from_db()
    Run.objects.filter(pk=run.pk).update(output="\x1b[31mfour", steps=7)
    differences = [
        {"what": "output", "log": "It is three.", "table": "\x1b[31mfour"},
        {"what": "steps", "log": 2, "table": 7},
    ]
    shown = ran("replay_run", str(run.pk), "--verify")
    assert (shown.code, shown.out.splitlines()) == (
        1,
        [
            f"Run {run.pk}: {run.last_seq} events, 2 differences between the log and the tables.",
            "  output: the log tells 'It is three.', the table holds '\\x1b[31mfour'",
            "  steps: the log tells 2, the table holds 7",
        ],
    )
    one = ran("replay_run", str(run.pk), "--verify", "--json")
    found = {"run": str(run.pk), "differences": differences, "events": run.last_seq, "since": []}
    assert (one.code, one.lines) == (1, [found])
    every = ran("replay_run", "--verify", "--all", "--json")
    assert (every.code, every.lines) == (
        1, [{"runs": 2, "events": run.last_seq + other.last_seq, "differences": 2, "found": [found]}],
    )  # fmt: skip


def test_nothing_is_not_called_sound_without_a_word() -> None:
    assert ran("replay_run", "--verify", "--all").out == (
        "0 runs, 0 events: 0 differences between the log and the tables.\n"
    )


# --- readers that leave, as a shell has them


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "command",
    [
        "follow_run RUN --json",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("replay_run RUN --speed 0", "list_runs --json", "explain_run RUN")
        ),
    ],
)
def test_a_command_whose_reader_has_left_ends_without_a_word(command: str, run: Run) -> None:
    """In a process of its own: what Python writes to stderr at its end counts too."""
    settings = connection.settings_dict
    url = f"postgresql://{settings['USER']}@/{settings['NAME']}?host={settings['HOST']}&port={settings['PORT'] or ''}"
    environment = {**os.environ, "DATABASE_URL": url.removesuffix("&port=")}
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [sys.executable, "manage.py", *command.replace("RUN", str(run.pk)).split()]
    ended = subprocess.run(
        arguments, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")
