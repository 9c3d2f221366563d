"""Breadth-first search over the states of a scenario, then the question whether each still leads to an end."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.model.moves import Moves
from tests.model.proof import changed_after_end, is_end, violation
from tests.model.rows import Key, World, canonical
from tests.model.rules import Rules
from tests.model.scenarios import Scenario

BOUND = 2_000_000  # states: more than any scenario has


@dataclass(frozen=True)
class Found:
    """What a search found: `wrong` is "" when every check holds, `story` the shortest way to what is wrong."""

    states: int
    seconds: float
    wrong: str = ""
    story: tuple[str, ...] = ()


def search(scenario: Scenario, broken: frozenset[str] = frozenset()) -> Found:
    began = time.process_time()
    rules = Rules(scenario, broken)
    moves = Moves(rules)
    first = rules.begin()
    canonical(first)
    keys: list[Key] = [first.key()]
    ids: dict[Key, int] = {keys[0]: 0}
    parents = array("i", [-1])
    edges_from, edges_to = array("I"), array("I")
    todo = deque([0])
    same: dict[Any, Any] = {}  # equal parts of states are kept once

    def found(wrong: str, at: int | None) -> Found:
        seconds = time.process_time() - began
        path: list[Key] = []
        while at is not None and at >= 0:
            path.append(keys[at])
            at = parents[at]
        return Found(len(keys), seconds, wrong, tuple(_story(moves, rules.begin(), path[::-1])))

    while todo:
        here = todo.popleft()
        before = World(keys[here])
        for _, who, after in moves.of(before):
            wrong = violation(after, scenario)
            if not wrong and changed_after_end(before, after):
                wrong = "8: a finished run changed"
            canonical(after)
            key: Key = tuple(same.setdefault(part, part) for part in after.key())  # type: ignore[assignment]
            there = ids.get(key)
            if there is None or wrong:
                there = len(keys)
                ids[key] = there
                keys.append(key)
                parents.append(here)
                if wrong:
                    return found(wrong, there)
                if there > BOUND:
                    return found(f"the bound of {BOUND:,} states was reached", None)
                todo.append(there)
            if who in "PS" and here != there:
                edges_from.append(here)
                edges_to.append(there)
    stuck = _stuck(keys, edges_from, edges_to)
    if stuck is not None:
        statuses = ", ".join(f"run {number + 1} {run.status}" for number, run in enumerate(keys[stuck][0]))
        return found(f"7: it sticks for ever ({statuses})", stuck)
    return found("", None)


def _story(moves: Moves, world: World, path: list[Key]) -> Iterator[str]:
    """Tell the moves along a path of states, each process under one name: a state folds twins, and may swap them."""
    for key in path[1:]:
        for what, _, after in moves.of(world):
            folded = World(after.key())
            canonical(folded)
            if folded.key() == key:
                yield what
                world = after
                break


def _stuck(keys: list[Key], edges_from: array[int], edges_to: array[int]) -> int | None:
    """Return a state from which the protocol's own moves reach no end: the first that has none, or the first of all."""
    heads, nexts = array("i", [-1]) * len(keys), array("i", [-1]) * len(edges_from)
    for edge, there in enumerate(edges_to):
        nexts[edge], heads[there] = heads[there], edge
    good = bytearray(len(keys))
    stack = [number for number, key in enumerate(keys) if is_end(World(key))]
    for number in stack:
        good[number] = 1
    while stack:
        edge = heads[stack.pop()]
        while edge >= 0:
            here = edges_from[edge]
            if not good[here]:
                good[here] = 1
                stack.append(here)
            edge = nexts[edge]
    first = good.find(0)
    if first < 0:
        return None
    moving = set(edges_from)
    return next((here for here in range(first, len(keys)) if not good[here] and here not in moving), first)
