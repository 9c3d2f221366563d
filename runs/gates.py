"""What bounds a run: how many like it are at work at once, and how many start in a time. And the lane that it waits in.

Keys are `agent:NAME` and `runs_of:OWNER`. A run carries what the code said when it was made; `runs/sql/0006_turns.sql` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runs.conf import settings
from tools.gates import Rate, gate

if TYPE_CHECKING:
    from runs.agents import Agent


def gates_of(agent: Agent, owner_id: Any) -> dict[str, Any] | None:
    """Return what bounds a run of this agent and owner, None for nothing."""
    now = settings()
    gates = {f"agent:{agent.name}": gate(agent.max_concurrency, _rate(agent.rate_limit))}
    if owner_id is not None:
        gates[f"runs_of:{owner_id}"] = gate(now.runs_per_owner, _rate(now.run_rate_per_owner))
    return {key: bounds for key, bounds in gates.items() if bounds} or None


def _rate(text: str | None) -> Rate | None:
    return None if text is None else Rate.parse(text)


def lane_of(queue: str, gates: Mapping[str, Any] | None) -> str:
    """Return the lane of a run, as `longhaul_run_lane` does: its queue ("" is the agents queue), then what bounds it."""
    names = (key + ("/rate" if "count" in bounds else "") for key, bounds in sorted((gates or {}).items()))
    return "\n".join([queue, *names])
