"""What a thread does not show to its readers is marked in the log, so that a fold of the thread's stream is the thread."""

from __future__ import annotations

import pytest

from runs.models import Run
from runs.pytest_longhaul import ScriptedModel, call, run_to_end
from tests.runs.scenes import Cast, add
from tests.streams.folding import Folded
from threads.models import Message

pytestmark = pytest.mark.django_db


def test_a_fold_of_all_logs_is_what_the_thread_shows(cast: Cast, scripted_model: ScriptedModel) -> None:
    agent = cast(tools=[add])
    scripted_model.say("Hello.", call("add", a=1, b=2), "3", "Fine.")
    extra = [{"role": "user", "content": "extra"}]
    thread = run_to_end(agent.start("Hi.")).thread
    unsaved = run_to_end(agent.start("1 + 2?", thread=thread, save="none", messages=extra))
    run_to_end(agent.start("And you?", thread=thread, messages=extra))
    fold = Folded()
    for run in Run.objects.filter(thread=thread).order_by("created_at"):
        for event in run.events():
            fold.take(event.as_dict())
    of_thread = [str(id) for id in thread.messages.filter(shown=True).order_by("position").values_list("pk", flat=True)]
    assert [id for id, each in fold.messages.items() if each["shown"]] == of_thread
    assert [each["content"][0].get("text") for each in fold.messages.values() if each["shown"]] == [
        "Hi.", "Hello.", "And you?", "Fine.",
    ]  # fmt: skip
    hidden = {id for id, each in fold.messages.items() if not each["shown"]}
    assert {str(id) for id in Message.objects.filter(run_id=unsaved.pk).values_list("pk", flat=True)} < hidden
    assert len(hidden) == 6  # five of the unsaved run, and what the last one was given beside its input
