"""What the commands about runs print, for people and for scripts, and what they answer to what they cannot do.

`explain_run` has a file of its own; what a pass of the sweep does is held in `test_sweep`, the lines that tell an event in
`test_terminal`. Here it is what a shell sees: the texts, the JSON, the exit codes.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from runs import bells, engine, invariants
from runs.agents import Agent
from runs.models import Event, Run, Status
from runs.providers.port import ModelEvent, ModelRequest, ProviderError, TextDelta
from runs.pytest_longhaul import ScriptedModel, call, move_clock, run_to_end
from tests.protocol.rows import wait_until
from tests.runs.invariant_cases import State
from tests.runs.scenes import Cast, Together, add, agents_process, rows, speaking
from threads.models import Message, Thread
from tools.models import Worker

PATIENCE = 15.0  # seconds that a command may take on a busy machine
LOST = timedelta(seconds=20)  # after so long a run that nobody took is stuck, and a worker is silent

pytestmark = pytest.mark.django_db
commits = pytest.mark.django_db(transaction=True)


@pytest.fixture
def agent(cast: Cast) -> Agent:
    return cast(tools=[add])


@dataclass
class Ran:
    """A command that has ended: its exit code, and what it wrote."""

    code: Any
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """stdout, which is JSON line by line."""
        return [json.loads(line) for line in self.out.splitlines()]


def ran(*arguments: str, out: io.StringIO | None = None) -> Ran:
    out, err = out or io.StringIO(), io.StringIO()
    code: Any = 0
    try:
        call_command(*arguments, stdout=out, stderr=err)
    except SystemExit as exit:
        code = exit.code
    return Ran(code, out.getvalue(), err.getvalue())


def refused(*arguments: str) -> str:
    """Why the command was refused, which changed nothing. To a shell it is a line on stderr and exit 1."""
    before = rows()
    with pytest.raises(CommandError) as caught:
        ran(*arguments)
    assert caught.value.returncode == 1
    assert rows() == before
    return str(caught.value)


def ended(agent: Agent, model: ScriptedModel, **options: Any) -> Run:
    """A run of two steps, that has completed."""
    model.say(call("add", a=1, b=2), "It is three.")
    return run_to_end(agent.start("How much is it?", **options))


# --- what all of them answer


RUN_COMMANDS = [["explain_run"], ["follow_run"], ["replay_run"], ["cancel_run"], ["check_runs", "--run"]]


@pytest.mark.parametrize("command", RUN_COMMANDS, ids=" ".join)
@pytest.mark.parametrize("id", ["nonsense", "0199f000-0000-7000-8000-000000000001", ""])
def test_an_unknown_run_is_answered_with_the_latest_ones(command: list[str], id: str, agent: Agent) -> None:
    assert refused(*command, id) == f"There is no run {id!r}; there are none yet (manage.py run_agent)."
    runs = [agent.start("hello") for _ in range(12)]
    said = refused(*command, id).splitlines()
    assert said[0] == f"There is no run {id!r}; there are:"
    latest = sorted(runs, key=lambda run: run.created_at, reverse=True)
    assert said[1:11] == [f"  {run.pk} clerk queued" for run in latest[:10]]
    assert said[11:] == ["  ..."]


@pytest.mark.parametrize(
    "command", [["explain_run"], ["replay_run", "--verify"], ["cancel_run"], ["check_runs", "--run"]], ids=" ".join
)
def test_a_part_of_an_id_is_enough_if_no_other_run_has_it(command: list[str], agent: Agent) -> None:
    run = agent.start("hello")
    other = agent.start("hello")
    Run.objects.filter(pk=other.pk).delete()
    twin = Run.objects.create(pk=f"{str(run.pk)[:8]}-0000-7000-8000-000000000001", thread=other.thread, agent="clerk")
    for part in (str(run.pk)[-6:], str(run.pk)[-6:].upper(), str(run.pk), str(run.pk)[:23]):
        assert ran(*command, part).out, part
    assert f"More than one run's id begins or ends with {str(twin.pk)[:8]!r}" in refused(*command, str(twin.pk)[:8])
    # Less than four characters say too little, and what is no part of an id is none
    for part in (str(run.pk)[-3:], "g" + str(run.pk)[-5:]):
        assert f"There is no run {part!r}" in refused(*command, part)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list_runs", "--limit", "0"], ["--limit is at least 1"]),
        (["list_runs", "--limit=-3"], ["--limit is at least 1"]),
        (["list_runs", "--limit", "many"], ["--limit", "invalid int value: 'many'"]),
        (["list_runs", "--status", "dead"], ["--status", "invalid choice: 'dead'", "completed"]),
        (["list_runs", "--dead"], ["unrecognized arguments: --dead"]),
        (["list_runs", "support"], ["unrecognized arguments: support"]),
        (["check_runs", "0199"], ["unrecognized arguments: 0199"]),
        (["sweep_runs", "--wet"], ["unrecognized arguments: --wet"]),
        (["cancel_run"], ["the following arguments are required: run"]),
        (["replay_run"], ["Give a run, or --verify --all"]),
        (["replay_run", "0199", "--verify", "--all"], ["Give a run, or --verify --all"]),
        (["replay_run", "--all"], ["--all goes with --verify"]),
        (["replay_run", "0199", "--verify", "--at-step", "1"], ["give one of them"]),
        (["replay_run", "0199", "--verify", "--speed", "1"], ["--speed is for playing"]),
        (["replay_run", "0199", "--speed=-1"], ["--speed", "0 (at once)"]),
        (["replay_run", "0199", "--speed", "nan"], ["--speed", "0 (at once)"]),
        (["follow_run"], ["the following arguments are required: run"]),
        (["explain_run"], ["the following arguments are required: run"]),
        (["follow_run", "0199", "--after", "last"], ["--after", "invalid int value: 'last'"]),
        (["follow_run", "0199", "--after=-1"], ["the last event you have seen: 0 or more"]),
    ],
    ids=lambda each: " ".join(each) if "_" in each[0] else "",
)
def test_an_option_that_cannot_be_is_refused(arguments: list[str], words: list[str]) -> None:
    said = refused(*arguments)
    for word in words:
        assert word in said


@commits
@pytest.mark.parametrize(
    "arguments",
    [
        ["list_runs"],
        ["list_runs", "--stuck", "--json"],
        ["explain_run", "0199f000-0000-7000-8000-000000000001"],
        ["cancel_run", "0199f000-0000-7000-8000-000000000001"],
        ["replay_run", "0199f000-0000-7000-8000-000000000001"],
        ["replay_run", "--verify", "--all"],
        ["follow_run", "0199f000-0000-7000-8000-000000000001"],
        ["check_runs"],
        ["sweep_runs"],
        ["sweep_runs", "--dry-run", "--json"],
    ],
    ids=" ".join,
)
def test_a_database_without_tables_is_to_be_migrated(empty_database: None, arguments: list[str]) -> None:
    with pytest.raises(CommandError, match=r"no tables of Longhaul yet: manage\.py migrate"):
        ran(*arguments)


@pytest.fixture
def empty_database() -> Iterator[None]:
    """Every connection that is made looks for its tables where there are none."""
    options = connection.settings_dict["OPTIONS"]
    connection.close()
    connection.settings_dict["OPTIONS"] = {**options, "options": "-c search_path=pg_temp"}
    try:
        yield
    finally:
        connection.close()
        connection.settings_dict["OPTIONS"] = options


# --- list_runs


def test_without_runs_the_list_says_so_and_to_a_script_nothing() -> None:
    assert ran("list_runs").out == "There are no runs.\n"
    assert ran("list_runs", "--active").out == "No run is active.\n"
    assert ran("list_runs", "--stuck").out == "No run is stuck.\n"
    assert ran("list_runs", "--active", "--stuck").out == "No run is stuck.\n"
    assert ran("list_runs", "--json").out == ""


def test_the_list_tells_the_latest_first_each_with_its_age_its_agent_and_why(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    done = ended(agent, scripted_model)
    move_clock(timedelta(hours=2, minutes=5))
    new = agent.start("hello")
    shown = ran("list_runs")
    assert (shown.code, shown.err) == (0, "")
    head, first, *rest = shown.out.splitlines()
    assert head.split() == ["run", "age", "agent", "and", "why"]
    assert first.startswith(f"{new.pk}  ")
    assert " s  clerk: queued for" in first
    [second] = [line for line in rest if str(done.pk) in line]
    assert second.startswith(f"{done.pk}  2 h 5 min  clerk: completed")
    assert "(end_turn)" in shown.out
    assert "There are more" not in shown.out


def test_a_script_gets_a_line_a_run_with_all_that_the_row_says(agent: Agent, scripted_model: ScriptedModel) -> None:
    done = ended(agent, scripted_model)
    new = agent.start("hello", thread=done.thread)
    first, second = ran("list_runs", "--json").lines
    assert (first["run"], second["run"]) == (str(new.pk), str(done.pk))
    finished = done.finished_at
    assert finished is not None
    assert second == {
        "run": str(done.pk),
        "thread": str(done.thread_id),
        "agent": "clerk",
        "status": "completed",
        "stop_reason": "end_turn",
        "error": None,
        "origin": "start",
        "parent": None,
        "priority": 0,
        "steps": 2,
        "legs": 2,
        "last_seq": done.last_seq,
        "usage": {"input_tokens": done.input_tokens, "output_tokens": done.output_tokens, "cost": 0.0},
        "created_at": done.created_at.isoformat(),
        "started_at": done.started_at and done.started_at.isoformat(),
        "finished_at": finished.isoformat(),
        "why": "completed (end_turn) after 2 steps",
        "mend": None,
        "stuck": False,
    }
    assert datetime.fromisoformat(first["created_at"]).tzinfo is not None
    assert (first["finished_at"], first["stop_reason"]) == (None, "")
    assert ran("explain_run", str(done.pk), "--json").lines == [second]


def test_only_the_active_or_only_the_stuck_ones(scripted_model: ScriptedModel) -> None:
    """Stuck is what nothing moves on: here a run whose worker is gone, and the run behind it, with nobody who sweeps."""
    state = State(scripted_model)
    over = {state.completed(), state.failed(), state.cancelled()}
    held = state.held()
    first = Run.objects.get(thread=held.thread, status="queued")
    unknown, waiting = state.unknown(), state.waiting()
    live = {held, first, unknown, waiting}
    assert listed() == over | live
    assert listed("--active") == live
    assert listed("--stuck") == set()
    move_clock(LOST)  # nobody has come for the queued run and the calls; an unknown call waits for a person
    assert listed("--stuck") == listed("--active", "--stuck") == {held, first, waiting}
    assert listed("--active") == live
    for number, kind in enumerate(("agents", "tools", "control")):
        Worker.objects.create(name=kind, kind=kind, host="h", pid=number, lock_key=number)
    assert listed("--stuck") == set()


def test_only_those_of_an_agent_or_a_status(cast: Cast, agent: Agent, scripted_model: ScriptedModel) -> None:
    other, new, done = cast("writer").start("hello"), agent.start("hello"), ended(agent, scripted_model)
    gone = agent.start("hello").cancel()
    assert listed("--agent", "writer") == {other}
    assert listed("--agent", "writer", "--agent", "clerk") == {other, new, done, gone}
    assert listed("--status", "completed", "--status", "cancelled") == {done, gone}
    assert listed("--status", "queued", "--agent", "clerk") == {new}
    assert ran("list_runs", "--agent", "nobody").out == "No run is like that.\n"
    assert ran("list_runs", "--agent", "nobody", "--json").out == ""


def test_in_a_pipe_a_run_is_a_line_however_long_its_reason(agent: Agent) -> None:
    run = agent.start("hello")
    run.cancel("a reason\nof two lines, " + "and long " * 30)
    head, line = ran("list_runs").out.splitlines()
    assert head.split() == ["run", "age", "agent", "and", "why"]
    assert line.startswith(f"{run.pk}  ")
    assert line.endswith("and long")
    assert line.index("clerk: ") == head.index("agent and why")


# --- cancel_run


def test_a_run_is_cancelled_once_with_its_reason(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = agent.start("hello")
    assert ran("cancel_run", str(run.pk)[-8:], "--reason", "not needed").out == (
        f"Run {run.pk} of clerk is cancelled; it was queued.\n"
    )
    run.refresh_from_db()
    assert (run.status, run.error and run.error["message"]) == ("cancelled", "not needed")
    # What has ended stays as it is
    before = rows()
    again = ran("cancel_run", str(run.pk), "--reason", "another")
    assert (again.code, again.out) == (
        0, f"Run {run.pk} had ended before, nothing was changed: cancelled (cancelled) after 0 steps: cancelled: not needed\n"
    )  # fmt: skip
    done = ended(agent, scripted_model)
    before = rows()
    [line] = ran("cancel_run", str(done.pk), "--json").lines
    assert (line["run"], line["status"], line["stop_reason"]) == (str(done.pk), "completed", "end_turn")
    assert rows() == before
    live = agent.start("hello")
    [line] = ran("cancel_run", str(live.pk), "--json").lines
    assert (line["run"], line["status"], line["error"]) == (str(live.pk), "cancelled", None)


def listed(*options: str) -> set[Run]:
    """The runs of the list, which are the same ones for a person."""
    found = {Run.objects.get(pk=line["run"]) for line in ran("list_runs", *options, "--json").lines}
    shown = ran("list_runs", *options).out
    assert {run for run in Run.objects.all() if str(run.pk) in shown} == found
    return found


@pytest.mark.parametrize("which", [[], ["--active"], ["--stuck"]], ids=str)
def test_the_list_ends_at_its_limit_and_says_that_there_are_more(which: list[str], agent: Agent) -> None:
    runs = [agent.start("hello") for _ in range(3)]
    move_clock(LOST)
    shown = ran("list_runs", *which, "--limit", "2")
    assert [str(run.pk) in shown.out for run in runs] == [False, True, True]
    assert shown.out.splitlines()[-1] == "There are more: --limit 4"
    assert [line["run"] for line in ran("list_runs", *which, "--limit", "2", "--json").lines] == [
        str(run.pk) for run in reversed(runs[1:])
    ]
    assert "There are more" not in ran("list_runs", *which, "--limit", "3").out


@pytest.mark.parametrize("width", ["40", "60", "200"])
def test_an_id_stays_whole_in_a_narrow_terminal(width: str, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what the next command is given."""
    monkeypatch.setenv("COLUMNS", width)
    run = agent.start("hello")
    assert any(line.startswith(str(run.pk)) for line in ran("list_runs").out.splitlines())


def test_what_others_wrote_does_nothing_to_the_terminal(agent: Agent) -> None:
    run = agent.start("hello")
    run.cancel()
    Run.objects.filter(pk=run.pk).update(agent="cl\x1b[2Jerk", error={"code": "c", "message": "a\x07b\u202ec [red]d"})
    for said in (ran("list_runs").out, ran("explain_run", str(run.pk)).out):
        assert "cl[2Jerk" in said
        assert "abc [red]d" in said  # and what reads like markup is text
    assert ran("list_runs", "--json").lines[0]["agent"] == "cl\x1b[2Jerk"


# --- check_runs


def test_a_sound_database_is_called_so(agent: Agent, scripted_model: ScriptedModel) -> None:
    assert (ran("check_runs").code, ran("check_runs").out) == (0, "0 runs, no invariant violated.\n")
    ended(agent, scripted_model)
    assert ran("check_runs").out == "1 run, no invariant violated.\n"
    agent.start("hello")
    checked = ran("check_runs", "--json")
    assert (checked.code, checked.err) == (0, "")
    assert checked.lines == [{"violations": dict.fromkeys("12345678", 0), "runs": 2}]


def test_a_violation_is_named_with_its_invariant_its_rule_and_its_run_and_fails_the_command(agent: Agent) -> None:
    run, sound = agent.start("hello"), agent.start("hello")
    Run.objects.filter(pk=run.pk).update(next_publish_at=None)
    checked = ran("check_runs")
    assert (checked.code, checked.err) == (1, "")
    said = checked.out.splitlines()
    assert said[0].startswith("Invariant 7: A queued run is due")
    assert said[1].startswith(f"  run {run.pk}: ")
    assert said[2:] == ["2 runs, 1 violation: 1 of invariant 7."]
    as_json = ran("check_runs", "--json")
    assert as_json.code == 1
    assert as_json.lines == [{"violations": {**dict.fromkeys("12345678", 0), "7": 1}, "runs": 2}]
    # Only that run
    alone = ran("check_runs", "--run", str(run.pk))
    assert (alone.code, alone.out.splitlines()[-1]) == (1, "1 run, 1 violation: 1 of invariant 7.")
    assert (
        ran("check_runs", "--run", str(sound.pk)).code,
        ran("check_runs", "--json", "--run", str(sound.pk)).code,
    ) == (
        0,
        0,
    )


def test_several_invariants_are_counted_each_and_a_rule_is_told_once(agent: Agent) -> None:
    for run in [agent.start("hello") for _ in range(2)]:
        Run.objects.filter(pk=run.pk).update(next_publish_at=None, last_seq=9)
    said = ran("check_runs").out.splitlines()
    assert said[-1] == "2 runs, 4 violations: 2 of invariant 2, 2 of invariant 7."
    assert [line.partition(":")[0] for line in said if line.startswith("Inv")] == ["Invariant 2", "Invariant 7"]
    assert len(said) == 2 + 4 + 1


def test_of_many_violations_the_first_are_shown_and_all_are_counted(agent: Agent) -> None:
    count = invariants.SHOWN + 3
    for _ in range(count):
        agent.start("hello")
    Run.objects.update(next_publish_at=None)
    said = ran("check_runs").out.splitlines()
    assert len([line for line in said if line.startswith("  run ")]) == invariants.SHOWN
    assert said[-2:] == [
        "  and 3 more of the same kinds",
        f"{count} runs, {count} violations: {count} of invariant 7.",
    ]


def test_a_violation_of_no_run_is_shown_too() -> None:
    Message.objects.create(thread=Thread.objects.create(), role="user", status="waiting", content=[])
    checked = ran("check_runs")
    assert checked.code == 1
    assert "  run (of none): " in checked.out


# --- sweep_runs


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is sent to the broker, in its place."""
    sent: list[tuple[Any, ...]] = []
    monkeypatch.setattr("runs.tasks.publish", lambda *message: sent.append(message))
    monkeypatch.setattr("tools.tasks.publish", lambda *message: sent.append(message))
    return sent


NOTHING: dict[str, Any] = {
    "published_runs": 0, "published_calls": 0, "reclaimed_runs": [], "reclaimed_calls": [], "expired_runs": [],
    "dead_workers": [],
}  # fmt: skip


def test_when_nothing_is_overdue_the_sweep_says_so(agent: Agent, published: list[Any]) -> None:
    agent.start("hello")
    for options in ([], ["--dry-run"]):
        swept = ran("sweep_runs", *options)
        assert (swept.code, swept.out, swept.err) == (0, "Nothing is overdue.\n", "")
        assert ran("sweep_runs", *options, "--json").lines == [NOTHING]


def test_a_pass_says_what_it_moved_and_a_rehearsal_what_it_would(
    agent: Agent, published: list[Any], scripted_model: ScriptedModel
) -> None:
    State(scripted_model).waiting()
    queued, late = agent.start("hello"), agent.start("hello", limits={"deadline_seconds": 5})
    published.clear()
    move_clock(LOST)
    # A run that the first half of a pass publishes, the second one may end
    moves = "published runs: 2, published calls: 2, expired runs: 1"
    expected = {**NOTHING, "published_runs": 2, "published_calls": 2, "expired_runs": [str(late.pk)]}
    before = rows()
    assert ran("sweep_runs", "--dry-run").out == f"The sweep would move: {moves}.\n"
    assert ran("sweep_runs", "--dry-run", "--json").lines == [expected]
    assert (rows(), published) == (before, [])
    assert ran("sweep_runs", "--json").lines == [expected]
    assert len(published) == 4
    late.refresh_from_db()
    assert (late.status, late.stop_reason) == (Status.FAILED, "deadline")
    move_clock(LOST)
    published.clear()
    assert ran("sweep_runs").out == "The sweep moved: published runs: 1, published calls: 2.\n"
    assert (queued.pk, 1, "clerk") in published


def test_a_pass_by_hand_leaves_no_session_behind(published: list[Any]) -> None:
    ran("sweep_runs")
    ran("sweep_runs", "--dry-run")
    wait_until(lambda: not _sessions("longhaul watcher"))


def _sessions(name: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_stat_clear_snapshot(), count(*) FROM pg_stat_activity"
            " WHERE application_name = %s AND datname = current_database()",
            [name],
        )
        return int(cursor.fetchone()[1])


# --- follow_run


def test_an_ended_run_is_shown_from_its_first_event_or_from_after_a_cursor(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    run = ended(agent, scripted_model)
    whole = ran("follow_run", str(run.pk))
    assert (whole.code, whole.err) == (0, "")  # of an ended run no worker is missed
    for word in ("user: How much is it?", "add(a=1, b=2)", "It is three.", "run completed (end_turn)"):
        assert word in whole.out, word
    log = [event.as_dict() for event in run.events()]
    assert ran("follow_run", str(run.pk), "--json").lines == json.loads(json.dumps(log, default=str))
    for after in range(run.last_seq):
        rest = ran("follow_run", str(run.pk), "--json", "--after", str(after)).lines
        assert [event["seq"] for event in rest] == list(range(after + 1, run.last_seq + 1))
    last = Event.objects.get(run=run, seq=run.last_seq - 1).seq
    assert "run completed (end_turn)" in ran("follow_run", str(run.pk), "--after", str(last)).out
    assert "How much is it?" not in ran("follow_run", str(run.pk), "--after", str(last)).out


@pytest.mark.parametrize("options", [[], ["--json"], ["--after", "3"]], ids=str)
@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_a_run_that_did_not_complete_fails_the_command(
    end: str, options: list[str], agent: Agent, scripted_model: ScriptedModel
) -> None:
    run = agent.start("hello")
    if end == "failed":
        scripted_model.say(ProviderError("auth", "bad key"))
        run_to_end(run)
    else:
        run.cancel("enough")
    run.refresh_from_db()
    options = ["--after", str(run.last_seq - 1)] if "--after" in options else options
    shown = ran("follow_run", str(run.pk), *options)
    assert shown.code == 1
    if "--json" in options:
        assert shown.lines[-1]["type"] == f"run.{end}"
    else:
        assert f"run {end} (" in shown.out


def test_after_the_last_event_of_an_ended_run_nothing_comes(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = ended(agent, scripted_model)
    for after in (run.last_seq, run.last_seq + 1):
        said = refused("follow_run", str(run.pk), "--after", str(after))
        assert said == f"The run has completed, and its last event is {run.last_seq}: nothing comes after."


class Following:
    """`follow_run` in a thread of its own, as another shell would have it."""

    def __init__(self, run: Run, *options: str) -> None:
        self.out = io.StringIO()
        self._ran: Ran | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, args=(str(run.pk), *options), daemon=True)
        self._thread.start()
        channel = bells.run_channel(run.pk)
        wait_until(lambda: bells.ear()._events.get(channel) or not self._thread.is_alive())

    def _follow(self, *arguments: str) -> None:
        try:
            self._ran = ran("follow_run", *arguments, out=self.out)
        except BaseException as error:
            self._error = error
        finally:
            connection.close()

    def ended(self) -> Ran:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), f"it still follows after: {self.out.getvalue()}"
        if self._error is not None:
            raise self._error
        assert self._ran is not None
        return self._ran

    def is_there(self) -> bool:
        return self._thread.is_alive()


@commits
def test_a_live_run_is_shown_as_it_speaks_until_it_ends(cast: Cast) -> None:
    may = threading.Semaphore(0)

    def script(request: ModelRequest) -> Iterator[ModelEvent]:
        for word in ("one\n", "two\n", "three"):
            assert may.acquire(timeout=PATIENCE)
            yield TextDelta(word)

    run = cast().start("count")
    plain, lines, later = Following(run), Following(run, "--json"), Following(run, "--json", "--after", "2")
    with speaking(script), agents_process() as process:
        leg = Together(lambda: engine.advance(run.pk, 1, process))
        may.release()
        # While the model is silent, what it has said is there.
        wait_until(lambda: "one" in plain.out.getvalue() and '"one' in lines.out.getvalue())
        assert "two" not in plain.out.getvalue()
        assert plain.is_there()
        may.release(2)
        leg.join()
    run.refresh_from_db()
    shown, whole, rest = plain.ended(), lines.ended(), later.ended()
    assert "run completed (end_turn)" in shown.out.splitlines()[-1]
    assert (shown.code, whole.code, rest.code) == (0, 0, 0)
    assert [event["seq"] for event in whole.lines] == list(range(1, run.last_seq + 1))
    assert rest.lines == whole.lines[2:]
    assert whole.lines[-1]["type"] == "run.completed"


@commits
def test_a_live_run_that_fails_ends_the_command_with_1(agent: Agent) -> None:
    run = agent.start("hello")
    following = Following(run)
    run.cancel()
    assert following.ended().code == 1
    assert "run cancelled (cancelled)" in following.out.getvalue()


@commits
def test_workers_that_a_live_run_lacks_are_named_beside_its_events(agent: Agent) -> None:
    run = agent.start("hello")
    following = Following(run, "--json")
    run.cancel()
    followed = following.ended()
    assert "No agents worker is present: the run waits. Start one:" in followed.err
    assert "worker -Q longhaul.agents" in followed.err
    assert "No control worker is present" in followed.err
    assert [line["type"] for line in followed.lines][-1] == "run.cancelled"  # stdout is JSON and nothing else


def test_who_leaves_is_told_how_to_come_back(
    agent: Agent, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ended(agent, scripted_model)
    log = list(run.events())

    def interrupted(self: Run, after: int = 0, follow: bool = False) -> Iterator[Any]:
        yield from log[after:5]
        raise KeyboardInterrupt  # Ctrl-C, while the next event is waited for

    monkeypatch.setattr(Run, "events", interrupted)
    for options in ([], ["--json"]):
        shown = ran("follow_run", str(run.pk), *options)
        assert shown.code == 130
        assert f"The run goes on without you. Watch it again: manage.py follow_run {run.pk} --after 5" in shown.err
        assert "Watch it again" not in shown.out


@commits
def test_a_run_that_is_deleted_while_it_is_followed_did_not_complete(agent: Agent) -> None:
    run = agent.start("hello")
    following = Following(run)
    wait_until(lambda: "is queued" in following.out.getvalue())
    Run.objects.filter(pk=run.pk).delete()
    followed = following.ended()
    assert followed.code == 1
    assert f"The run {run.pk} was deleted." in followed.err


def test_a_cursor_beyond_the_last_event_of_a_live_run_is_refused(agent: Agent) -> None:
    """Nobody has seen that event. To wait for it would show nothing of the run's end, and call a failure a success."""
    run = agent.start("hello")
    run.refresh_from_db()
    said = refused("follow_run", str(run.pk), "--after", str(run.last_seq + 1))
    assert said == f"The run's last event so far is {run.last_seq}: --after is the seq of the last event you have seen."
