"""The protocol holds in every interleaving of the model, and every rule of it is needed.

A rule that is left out and that no search misses is written down as harmless, with the reason: a search that finds
something there all the same fails too.
"""

from __future__ import annotations

import json

import pytest

from tests.model.__main__ import main, of_break
from tests.model.scenarios import BREAKS, LARGE, QUICK, SCENARIOS, Scenario
from tests.model.search import search

FOUND = [name for name, broken in BREAKS.items() if not broken.harmless]
HARMLESS = [name for name, broken in BREAKS.items() if broken.harmless]


@pytest.mark.parametrize("scenario", QUICK, ids=lambda scenario: scenario.name)
def test_every_check_holds(scenario: Scenario) -> None:
    found = search(scenario)
    assert not found.wrong, "\n".join(found.story)


@pytest.mark.parametrize("name", FOUND)
def test_a_rule_that_is_left_out_has_a_story_that_ends_badly(name: str) -> None:
    found = of_break(name)
    assert found.wrong
    assert found.story, "told move by move"


@pytest.mark.parametrize("name", HARMLESS)
def test_a_rule_whose_absence_is_harmless_is_so(name: str) -> None:
    assert of_break(name).wrong == ""


@pytest.mark.proof
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", LARGE, ids=lambda scenario: scenario.name)
def test_every_check_holds_in_large(scenario: Scenario) -> None:
    found = search(scenario)
    assert not found.wrong, "\n".join(found.story)


def test_the_table_tells_a_break_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain_counts_poison"]) == 0
    told = capsys.readouterr().out
    assert "What if a drained leg counts as lost?" in told
    assert "agents-0 gets SIGTERM" in told
    assert "=> 5: more losses were counted than workers were lost" in told


def test_the_table_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "prompt", "held_end_releases_next"]) == 0
    whole, broken = json.loads(capsys.readouterr().out)
    assert (whole["verdict"], whole["as_expected"]) == ("all checks hold", True)
    assert (broken["verdict"], broken["as_expected"]) == ("held: two runs occupy one thread", True)
    assert broken["states"] > 0
    assert broken["story"]


def test_every_break_names_a_scenario() -> None:
    assert {broken.scenario for broken in BREAKS.values()} <= set(SCENARIOS)
