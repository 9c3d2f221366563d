"""Greenlets of one agents worker take turns, also when their models are ahead of them and no read ever waits."""

from __future__ import annotations

import json
import subprocess
import sys

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

def speak(name):
    leg = SimpleNamespace(
        model="m", instructions="", window=SimpleNamespace(messages=list), tools=b"", options={}, usage=None,
        definition=SimpleNamespace(tool_choice="auto"),
        provider=SimpleNamespace(stream=lambda request: (number for number in range(1000))),
        claim=SimpleNamespace(check=lambda: None, interruptible=nullcontext),
        _hear=lambda turn, answer, event: heard.append(name),
    )
    Leg._speak(leg, SimpleNamespace(last=False))

gevent.joinall([gevent.spawn(speak, name) for name in "ab"], raise_error=True)
print(json.dumps("".join(heard)))
"""


@pytest.mark.slow
def test_a_leg_whose_model_is_ahead_of_it_does_not_hold_up_the_others() -> None:
    done = subprocess.run([sys.executable, "-c", LEGS], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heard = json.loads(done.stdout.splitlines()[-1])
    assert (heard.count("a"), heard.count("b")) == (1000, 1000)
    longest = max(map(len, heard.replace("ab", "a b").replace("ba", "b a").split()))
    assert longest < 100
