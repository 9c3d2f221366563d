"""Runs that follow another one: resume, retry and fork are new runs, and what they are shown is what they should be."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.db import connection
from django.test.utils import CaptureQueriesContext

from runs import engine, lifecycle, successors
from runs.agents import Agent
from runs.exceptions import BadInput, NothingToDo, NotLast, ThreadBusy
from runs.models import Run
from runs.providers.port import ProviderError, UsageReported
from runs.pytest_longhaul import ScriptedModel, assert_invariants, call, run_to_end
from runs.testing.inline_worker import working
from runs.verification import verify
from tests.runs.scenes import Cast, Together, add, payloads, refused, texts
from tests.workers.conftest import eventually
from threads import database
from threads.exceptions import ThreadGone
from threads.ids import new_id
from threads.models import Message, Thread

pytestmark = pytest.mark.django_db


@pytest.fixture
def agent(cast: Cast) -> Agent:
    return cast(tools=[add], instructions="Be kind.")


def statuses(run: Run) -> list[tuple[str, str]]:
    return list(run.thread.messages.order_by("position").values_list("role", "status"))


def whole(run: Run) -> None:
    """Every invariant holds, and the logs alone tell what the tables hold."""
    assert_invariants()
    for each in Run.objects.all():
        assert verify(each).differences == []


def cut(run: Run, text: str = "So far so") -> Run:
    """Cancel the run in the middle of an answer of which so much was said."""
    with working() as present:
        claim = lifecycle.claim(
            run.pk, run.dispatch_seq, worker=present.id, worker_name="agents@a", task_id="", leg=new_id()
        )
        message = new_id()
        turn = (message, engine.MARGIN, 0, 100, 50, lifecycle.UNLIMITED_TOKENS, lifecycle.UNLIMITED_COST)
        lifecycle.open_turn(run.pk, claim["epoch"], present.id, turn)
        delta = {"message": str(message), "text": text}
        batch = ([run.pk], [claim["epoch"]], [message], ["text.delta"], [1], [database.dumps(delta)])
        database.rows_of(
            "SELECT longhaul_deltas_write(%s, %s::uuid[], %s::int[], %s::uuid[], %s::text[], %s::int[], %s::jsonb[])",
            (present.id, *batch),
        )
    return run.cancel()


# --- retry


def test_a_retry_asks_for_the_last_answer_of_a_completed_run_again(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("add", a=1, b=2), "three", "four")
    run = run_to_end(agent.start("1 + 2?", metadata={"k": 1}, priority=3, limits={"max_steps": 9}))
    again = run.retry()
    assert (again.parent, again.origin, again.thread, again.status) == (run, "retry", run.thread, "queued")
    assert (again.metadata, again.priority, again.overrides) == ({"k": 1}, 3, {"limits": {"max_steps": 9}})
    answer = Message.objects.get(run_id=run.pk, role="assistant", step=2)
    assert answer.status == "superseded"
    assert payloads(again, "run.queued") == [{"reason": "start", "superseded": str(answer.pk)}]
    run_to_end(again)
    assert texts(scripted_model.requests[2]) == ["1 + 2?", "calls 1", "-> 3"]
    run.refresh_from_db()
    assert (run.output, again.output) == ("three", "four")
    # What the first run was shown can be told as ever, and later runs see the new answer only.
    assert [message.role for message in run.step_set.get(number=2).shown()] == ["user", "assistant", "tool"]
    assert [message.text for message in again.step_set.get().shown()] == ["1 + 2?", "", ""]
    scripted_model.say("bye")
    run_to_end(agent.start("next", thread=run.thread))
    assert texts(scripted_model.requests[3]) == ["1 + 2?", "calls 1", "-> 3", "four", "next"]
    whole(run)


def test_a_retry_goes_on_from_calls_that_were_answered(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("add", a=1, b=2), ProviderError("auth", "no"), "three")
    run = run_to_end(agent.start("1 + 2?"))
    assert run.status == "failed"
    again = run_to_end(run.retry())
    assert texts(scripted_model.requests[2]) == ["1 + 2?", "calls 1", "-> 3"]
    assert (again.output, [status for _, status in statuses(run)]) == (
        "three",
        ["completed", "completed", "completed", "discarded", "completed"],
    )
    whole(run)


def test_a_retry_of_a_run_that_its_limit_ended_after_calls_runs_no_tool_again(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    scripted_model.say([call("add", a=1, b=2), UsageReported(90, 20)], "three")
    run: Any = run_to_end(agent.start("1 + 2?", limits={"max_total_tokens": 100}))
    assert (run.status, run.stop_reason) == ("failed", "token_budget")
    again = run_to_end(run.retry())
    assert (again.output, texts(scripted_model.requests[1])) == ("three", ["1 + 2?", "calls 1", "-> 3"])
    whole(run)


def test_a_retry_leaves_out_what_a_cancel_kept_of_an_answer(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = cut(agent.start("hello"))
    assert statuses(run) == [("user", "completed"), ("assistant", "partial")]
    again = run.retry()
    assert statuses(run) == [("user", "completed"), ("assistant", "superseded")]
    scripted_model.say("hello yourself")
    run_to_end(again)
    assert texts(scripted_model.requests[0]) == ["hello"]
    whole(run)


def test_a_retry_of_a_run_that_was_cancelled_before_it_said_anything(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    run = agent.start("hello").cancel()
    scripted_model.say("hi")
    assert run_to_end(run.retry()).output == "hi"
    whole(run)


def test_a_retry_takes_overrides_over_those_of_the_run(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("one", "two")
    run = run_to_end(
        agent.start(
            "hello",
            model="openai:a",
            instructions="first",
            tools=["add"],
            limits={"max_steps": 5, "max_total_tokens": 900},
            options={"temperature": 1, "seed": 7},
            save="all",
        )
    )
    again = run_to_end(run.retry(model="openai:b", tools=[], limits={"max_steps": 3}, options={"temperature": 0}))
    assert (again.overrides, again.save_mode) == (
        {
            "model": "openai:b",
            "instructions": "first",
            "tools": [],
            "limits": {"max_steps": 3, "max_total_tokens": 900},
            "options": {"temperature": 0, "seed": 7},
        },
        "all",
    )
    request = scripted_model.requests[1]
    assert (request.model, request.instructions, request.tools, request.options) == (
        "b",
        "first",
        b"",
        {"temperature": 0, "seed": 7},
    )
    whole(run)


def test_what_cannot_be_retried_is_refused_and_nothing_is_changed(agent: Agent, scripted_model: ScriptedModel) -> None:
    live = agent.start("hello")
    with refused(BadInput, "finished", "queued"):
        live.retry()
    held = agent.start("and", thread=live.thread)
    with refused(BadInput, "finished", "held"):
        held.retry()
    scripted_model.say("one", "two", "three", "aside")
    run_to_end(held)
    live.refresh_from_db()
    with refused(NotLast, str(held.pk), "Fork"):
        live.retry()
    later = agent.start("third", thread=live.thread)
    with refused(ThreadBusy, str(later.pk)):
        held.retry()
    run_to_end(later)
    with refused(BadInput, "max_stepps"):
        later.retry(limits={"max_stepps": 1})
    with refused(BadInput, "priority", "cannot be overridden"):
        later.retry(priority=1)
    unsaved = run_to_end(agent.start("psst", save="none"))
    with refused(BadInput, "save='none'", "Fork"):
        unsaved.retry()
    assert NotLast.code == "not_last"


def test_a_retry_of_a_retry(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("one", "two", "three")
    first = run_to_end(agent.start("hello"))
    second = run_to_end(first.retry())
    with refused(NotLast, str(second.pk)):
        first.retry()
    third = run_to_end(second.retry())
    assert (third.parent, texts(scripted_model.requests[2])) == (second, ["hello"])
    # A retry that never spoke is none that came later.
    third.retry().cancel()
    scripted_model.say("four")
    assert run_to_end(third.retry()).output == "four"
    whole(first)


@pytest.mark.django_db(transaction=True)
def test_of_two_retries_at_once_one_supersedes_and_the_other_is_told(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    scripted_model.say("one")
    run = run_to_end(agent.start("hello"))
    results = Together(*[run.retry] * 2).join()
    assert sorted(type(each).__name__ for each in results) == ["Run", "ThreadBusy"]
    assert Run.objects.count() == 2
    assert statuses(run) == [("user", "completed"), ("assistant", "superseded")]
    whole(run)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("other", ["start", "delete"])
def test_a_retry_while_something_else_happens_to_its_thread(
    agent: Agent, scripted_model: ScriptedModel, other: str
) -> None:
    scripted_model.say("one")
    run = run_to_end(agent.start("hello"))
    thread = Thread.objects.get()
    does = partial(agent.start, "next", thread=thread) if other == "start" else partial(_delete, thread)
    retried, _ = Together(run.retry, does).join()
    assert isinstance(retried, Run | ThreadBusy | NotLast | BadInput | Run.DoesNotExist), retried
    whole(run)


def _delete(thread: Thread) -> None:
    thread.delete()


@pytest.mark.django_db(transaction=True)
def test_a_fork_whose_thread_is_deleted_meanwhile_is_whole_and_so_is_the_deletion(
    agent: Agent, scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_model.say("one")
    run = run_to_end(agent.start("hello"))
    place_after = successors._place_after
    begun: list[Together] = []

    def delete_first(*arguments: Any) -> int:
        place = place_after(*arguments)
        begun.append(Together(partial(_delete, run.thread)))
        eventually(lambda: begun[0].over() or _blocked(), why="the deletion is through, or waits for the fork")
        return place

    monkeypatch.setattr(successors, "_place_after", delete_first)
    forked = run.fork(after_step=0)
    assert begun[0].join() == [None]
    forked.refresh_from_db()
    assert (forked.parent, list(Run.objects.all())) == (None, [forked])
    assert_invariants()


def _blocked() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return bool(cursor.fetchone()[0])


@pytest.mark.django_db(transaction=True)
def test_no_run_follows_one_whose_thread_is_gone(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = agent.start("hello").cancel()
    Thread.objects.get().delete()
    for follow in (run.retry, run.fork, run.resume):
        with pytest.raises((ThreadGone, Run.DoesNotExist)):
            follow()


# --- fork


@pytest.fixture
def worked(agent: Agent, scripted_model: ScriptedModel) -> Run:
    """Two sums, then the answer: three steps, on a thread that was talked on before."""
    scripted_model.say("Hello.", call("add", a=1, b=2), [call("add", a=3, b=4), call("add", a=5, b=6)], "3, 7 and 11.")
    thread = Thread.objects.create(
        owner=User.objects.create_user("ann"),
        agent="clerk",
        title="Sums",
        metadata={"k": 1},
        overrides={"instructions": "Be brief."},
    )
    run_to_end(agent.start("Hi.", thread=thread))
    return run_to_end(agent.start("Three sums.", thread=thread, metadata={"m": 2}, priority=4))


BEFORE = ["Hi.", "Hello.", "Three sums."]


@pytest.mark.parametrize(
    ("step", "shown"),
    [(0, BEFORE), (1, [*BEFORE, "calls 1", "-> 3"]), (2, [*BEFORE, "calls 1", "-> 3", "calls 2", "-> 7", "-> 11"])],
)
def test_a_fork_goes_on_after_a_step_on_a_copy_of_the_thread(
    worked: Run, scripted_model: ScriptedModel, step: int, shown: list[str]
) -> None:
    source = list(worked.thread.messages.order_by("position").values())
    fork = worked.fork(after_step=step)
    assert (fork.parent, fork.origin, fork.status, fork.steps) == (worked, "fork", "queued", 0)
    assert (fork.metadata, fork.priority, fork.owner) == ({"m": 2}, 4, worked.owner)
    assert fork.last_seq == fork.event_set.count()
    thread = fork.thread
    assert thread != worked.thread
    kept = ("owner_id", "agent", "title", "metadata", "overrides")
    assert [getattr(thread, name) for name in kept] == [getattr(worked.thread, name) for name in kept]
    copies = list(thread.messages.order_by("position").values())
    assert [copy["position"] for copy in copies] == list(range(1, len(shown) + 1))
    assert [copy["content"] for copy in copies] == [message["content"] for message in source[: len(shown)]]
    assert not {copy["id"] for copy in copies} & {message["id"] for message in source}
    assert [copy["run_id"] for copy in copies] == [None, None, fork.pk, *[None] * (len(shown) - 3)]
    assert (fork.input_message_id, {copy["step"] for copy in copies}) == (copies[2]["id"], {None})
    scripted_model.say("Another answer.")
    run_to_end(fork)
    assert texts(scripted_model.requests[-1]) == shown
    assert scripted_model.requests[-1].instructions == "Be brief."
    # The run that it came from is as it was.
    assert list(worked.thread.messages.order_by("position").values()) == source
    whole(worked)


def test_a_fork_after_the_step_that_ended_a_run_has_nothing_to_do(worked: Run) -> None:
    for step in (None, 3):
        with refused(NothingToDo):
            worked.fork(step)


@pytest.mark.parametrize("step", [-1, 4, 2**70, "1", 1.0, True])
def test_a_fork_after_a_step_that_is_not_there_is_refused(worked: Run, step: Any) -> None:
    with refused(BadInput, "after_step"):
        worked.fork(step)


def test_a_fork_takes_overrides_over_those_of_the_run(worked: Run, scripted_model: ScriptedModel) -> None:
    with refused(BadInput, "no tool"):
        worked.fork(0, tools=["shout"])
    scripted_model.say("Done.", "Done again.")
    fork = run_to_end(worked.fork(0, model="openai:b", tools=[], limits={"max_steps": 2}))
    request = scripted_model.requests[-1]
    assert (request.model, request.tools) == ("b", b"")
    other = run_to_end(fork.fork(0, model="openai:c"))
    assert other.overrides == {"model": "openai:c", "tools": [], "limits": {"max_steps": 2}}
    assert texts(scripted_model.requests[-1]) == BEFORE
    whole(worked)


def test_a_live_run_is_forked_at_what_it_has_committed(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = agent.start("1 + 2?")
    scripted_model.say(call("add", a=1, b=2))
    with working() as present:
        engine.advance(run.pk, 1, engine.Process(present))
    run.refresh_from_db()
    assert (run.status, run.steps) == ("waiting", 1)
    with refused(BadInput, "step 1", "not all answered", "after step 0"):
        run.fork()
    with refused(BadInput, "not all answered"):
        run.fork(1)
    fork = run.fork(0)
    scripted_model.say("three", "3")
    run_to_end(fork)
    assert texts(scripted_model.requests[-1]) == ["1 + 2?"]
    assert run_to_end(run).output == "3"
    whole(run)


def test_a_run_that_has_not_begun_is_forked_at_its_input(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = agent.start("hello", messages=[{"role": "system", "content": "Be quick."}])
    held = agent.start("and", thread=run.thread)
    with refused(BadInput, "held"):
        held.fork()
    fork = run.fork()
    scripted_model.say("hi")
    run_to_end(fork)
    assert texts(scripted_model.requests[0]) == ["Be quick.", "hello"]
    whole(run)


def test_a_failed_and_a_cancelled_run_are_forked_at_their_last_step(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    scripted_model.say(call("add", a=1, b=2), ProviderError("auth", "no"), "three", "hi")
    failed = run_to_end(agent.start("1 + 2?"))
    run_to_end(failed.fork())
    assert texts(scripted_model.requests[2]) == ["1 + 2?", "calls 1", "-> 3"]
    cancelled = cut(agent.start("hello"))
    run_to_end(cancelled.fork())
    assert texts(scripted_model.requests[3]) == ["hello"]  # what was cut is of no committed step
    whole(failed)


def test_a_run_that_is_not_saved_is_forked_with_all_that_it_saw(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("Hello.", "Unseen.", call("add", a=1, b=2), "three", "3", "bye")
    thread = run_to_end(agent.start("Hi.")).thread
    run_to_end(agent.start("Psst.", thread=thread, save="none"))
    extra = [{"role": "user", "content": "extra"}]
    run = run_to_end(agent.start("1 + 2?", thread=thread, save="none", messages=extra))
    fork = run_to_end(run.fork(1))
    expected = ["Hi.", "Hello.", "extra", "1 + 2?", "calls 1", "-> 3"]
    assert texts(scripted_model.requests[4]) == expected
    run_to_end(agent.start("next", thread=fork.thread))
    assert texts(scripted_model.requests[5]) == [*expected, "next"]  # the copies are shown to all
    whole(run)


def test_a_fork_keeps_its_input_in_sight_when_the_window_moves_on(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say(call("add", a=1, b=2), call("add", a=3, b=4), "7", "seven")
    run = run_to_end(agent.start("Sums.", context={"last_messages": 2}))
    run_to_end(run.fork(2))
    assert texts(scripted_model.requests[3]) == texts(scripted_model.requests[2]) == ["Sums.", "calls 1", "-> 7"]
    whole(run)


def test_a_fork_of_a_run_without_an_input_of_its_own(agent: Agent, scripted_model: ScriptedModel) -> None:
    thread = Thread.objects.create()
    thread.save(role="user", content="open question")
    scripted_model.say("answer", "next answer", "another answer")
    run = run_to_end(agent.start(thread=thread))
    run_to_end(agent.start("next", thread=thread))
    fork = run_to_end(run.fork(0))
    assert (fork.input_message_id, texts(scripted_model.requests[2])) == (None, ["open question"])
    whole(run)


def test_what_was_superseded_or_said_later_is_not_copied(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("one", call("add", a=1, b=2), "two", "three", "four")
    first = run_to_end(agent.start("hello"))
    second = run_to_end(first.retry())
    run_to_end(agent.start("next", thread=first.thread))
    run_to_end(second.fork(1))
    assert texts(scripted_model.requests[4]) == ["hello", "calls 1", "-> 3"]
    whole(first)


def test_a_fork_copies_the_correction_of_an_answer(cast: Cast, scripted_model: ScriptedModel) -> None:
    agent = cast(output_schema={"type": "number"})
    scripted_model.say("one", "1", "1")
    run = run_to_end(agent.start("one?"))
    assert (run.output, run.steps) == (1, 2)
    fork = run_to_end(run.fork(1))
    assert (fork.output, texts(scripted_model.requests[2])) == (1, texts(scripted_model.requests[1]))
    assert fork.input_message_id == Message.objects.get(run_id=fork.pk, role="user").pk
    whole(run)


def test_a_long_thread_is_copied_by_as_many_queries_as_a_short_one(worked: Run, scripted_model: ScriptedModel) -> None:
    def queries() -> int:
        with CaptureQueriesContext(connection) as told:
            worked.fork(2)
        return len(told)

    before = queries()
    long = worked.thread
    Message.objects.bulk_create(
        Message(thread=long, role="user", content=[{"type": "text", "text": "x"}], position=-number)
        for number in range(300)
    )
    assert queries() == before
    assert Thread.objects.order_by("-created_at")[0].messages.count() == 308


@pytest.mark.django_db(transaction=True)
async def test_a_retry_and_a_fork_from_async_code(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("one")
    run = await sync_to_async(run_to_end)(await agent.astart("hello"))
    retried = await run.aretry(instructions="Be quick.")
    forked = await run.afork(after_step=0)
    assert (retried.origin, forked.origin) == ("retry", "fork")
    await sync_to_async(assert_invariants)()
    await sync_to_async(
        lambda: connection.close()
    )()  # of the thread that async code uses: the test database is dropped


# --- resume


def test_a_held_run_that_was_cancelled_is_resumed_with_its_input(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("one", "two")
    before = agent.start("first")
    extra = [{"role": "system", "content": "Be quick.", "metadata": {"e": 1}}]
    held = agent.start("second", thread=before.thread, messages=extra, client_id="c2").cancel()
    run_to_end(before)
    resumed = held.resume()
    message = Message.objects.get(run_id=resumed.pk, role="user")
    assert (message.text, message.client_id, message.status) == ("second", "c2", "completed")
    assert Message.objects.get(run_id=resumed.pk, role="system").metadata == {"e": 1}
    run_to_end(resumed)
    assert texts(scripted_model.requests[1]) == ["first", "one", "Be quick.", "second"]
    # The old run is as it was.
    assert Message.objects.filter(run_id=held.pk, status="discarded").count() == 2
    whole(before)


def test_a_saved_message_of_a_held_run_that_was_cancelled_is_given_again(
    agent: Agent, scripted_model: ScriptedModel
) -> None:
    scripted_model.say("one", "two")
    before = agent.start("first")
    message = before.thread.save(role="user", content="second", metadata={"m": 1}, client_id="c2")
    held = agent.start(message=message).cancel()
    run_to_end(before)
    resumed = run_to_end(held.resume())
    again = Message.objects.get(run_id=resumed.pk, role="user")
    assert (again.text, again.metadata, again.client_id) == ("second", {"m": 1}, "c2")
    assert texts(scripted_model.requests[1]) == ["first", "one", "second"]
    whole(before)


def test_a_held_run_that_was_cancelled_waits_again_while_the_thread_is_occupied(agent: Agent) -> None:
    before = agent.start("first")
    held = agent.start("second", thread=before.thread, save="none").cancel()
    resumed = held.resume()
    assert (resumed.status, resumed.save_mode) == ("held", "none")
    with refused(ThreadBusy):
        held.retry()
    whole(before)


def test_a_held_run_that_was_cancelled_is_retried_with_its_input(agent: Agent, scripted_model: ScriptedModel) -> None:
    scripted_model.say("one", "two")
    before = agent.start("first")
    held = agent.start("second", thread=before.thread).cancel()
    run_to_end(before)
    assert run_to_end(held.retry()).output == "two"
    assert texts(scripted_model.requests[1]) == ["first", "one", "second"]
    whole(before)


def test_a_run_that_is_not_saved_is_resumed_with_an_input_only(agent: Agent, scripted_model: ScriptedModel) -> None:
    run = agent.start("hello", save="none").cancel()
    with refused(BadInput, "save='none'", "Fork"):
        run.resume()
    scripted_model.say("hi")
    assert run_to_end(run.resume("hello again")).output == "hi"
    whole(run)


@pytest.mark.parametrize("follow", ["resume", "retry"])
def test_a_run_that_was_rolled_back_is_given_its_input_again(
    cast: Cast, scripted_model: ScriptedModel, follow: str
) -> None:
    scripted_model.say("Stopped.", "Three.")
    agent = cast()
    run = agent.start("one and two", messages=[{"role": "system", "content": "be short"}], client_id="c")
    agent.start("quick", thread=run.thread, busy="steer")
    run_to_end(agent.start("stop", thread=run.thread, busy="rollback"))
    run.refresh_from_db()
    with refused(BadInput, "rolled back"):
        run.fork()
    new = run_to_end(getattr(run, follow)())
    assert (new.parent, new.origin, new.output) == (run, follow, "Three.")
    assert texts(scripted_model.requests[-1]) == ["stop", "Stopped.", "be short", "one and two"]
    assert (
        new.thread.messages.filter(client_id="c").values_list("status", flat=True).order_by("position")[1]
        == "completed"
    )
    whole(new)
