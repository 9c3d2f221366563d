"""Greenlets of one agents worker take turns, also when their models are ahead of them and no read ever waits."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby

import pytest

from agents_project.embedded import PROJECT

# Two legs, in a process of its own under gevent's patches, whose models have said everything already. Prints in whose name
# each event was heard.
LEGS = """
from gevent import monkey
monkey.patch_all()
import gevent, json, django
django.setup()
from contextlib import nullcontext
from types import SimpleNamespace
from runs.engine import Leg

heard = []

def speak(name, late):
    leg = SimpleNamespace(
        model="m", instructions="", window=SimpleNamespace(messages=list), tools=b"", options={}, usage=None,
        definition=SimpleNamespace(choice_at=lambda step, last: "auto", parallel_tool_calls=None),
        quota=SimpleNamespace(limits=None),
        provider=SimpleNamespace(stream=lambda request: (number for number in range(1000))),
        claim=SimpleNamespace(check=lambda: None, interruptible=nullcontext),
        process=SimpleNamespace(flusher=SimpleNamespace(is_late=late)),
        _hear=lambda turn, answer, event: heard.append(name),
    )
    Leg._speak(leg, SimpleNamespace(step=1, last=False))

said = []
for late in (False, True):
    heard.clear()
    gevent.joinall([gevent.spawn(speak, name, late) for name in "ab"], raise_error=True)
    said.append("".join(heard))
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_leg_whose_model_is_ahead_of_it_does_not_hold_up_the_others() -> None:
    done = subprocess.run([sys.executable, "-c", LEGS], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    usual, late = json.loads(done.stdout.splitlines()[-1])
    for heard in (usual, late):
        assert (heard.count("a"), heard.count("b")) == (1000, 1000)
    assert 1 < longest(usual) < 100
    assert longest(late) <= 2  # the flusher has a turn after every event


def longest(heard: str) -> int:
    """Return the most events that one leg heard in a row."""
    return max(len(list(group)) for _, group in groupby(heard))
