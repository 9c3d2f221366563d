"""The port that `tools` declares (tools.run_log.RunLog), implemented. Installed by `RunsConfig.ready()`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from django.db import transaction

from runs import admission, agents, bells, lifecycle
from runs.exceptions import AgentsError, UnknownAgent
from runs.models import LIVE, Run
from threads.models import Thread
from tools.exceptions import ToolError, ToolNotAvailable, UnknownTool
from tools.hooks import Hooks
from tools.registry import Tool

logger = logging.getLogger("longhaul.tools")


def _asked_for(agent: agents.Agent, claimed: Mapping[str, Any]) -> Tool:
    """Return a tool of the agent's functions, which are asked again: they may be closed over what no other process has."""
    name = claimed["name"]
    try:
        tools = agent.tools_of(Run.objects.get(pk=claimed["run"]))
    except (AgentsError, ToolError) as error:
        logger.warning("The tools of agent %s could not be asked for: %s", agent.name, error)
        raise ToolNotAvailable(f"{name} is not available: what offers it to this run failed.") from error
    if name not in tools:
        raise ToolNotAvailable(f"{name} is not offered to this run any more.")
    return tools[name]


class DatabaseRunLog:
    """Reaches a run by its row."""

    def record(self, run_id: UUID, type: str, payload: Mapping[str, Any]) -> bool:
        with transaction.atomic():
            if not Run.objects.select_for_update(no_key=True).filter(pk=run_id, status__in=LIVE).exists():
                return False  # it has ended, and nothing is written to it any more
            lifecycle.record(run_id, type, payload)
            transaction.on_commit(lambda: bells.ring([bells.run_channel(run_id)]))
        return True

    def announce(self, answer: Mapping[str, Any]) -> None:
        admission.announce(answer)

    def run(self, run_id: UUID) -> Run:
        return Run.objects.get(pk=run_id)

    def thread(self, thread_id: UUID) -> Thread:
        return Thread.objects.get(pk=thread_id)

    def live(self, run_id: UUID) -> bool:
        return Run.objects.filter(pk=run_id, status__in=LIVE).exists()

    def tool(self, claimed: Mapping[str, Any]) -> Tool:
        # The agent's own tools: what a run overrides only narrows them, and was narrowed when the call was made.
        try:
            agent = agents.get(claimed["agent"])
        except UnknownAgent as error:  # it is not in this worker's code, or its module cannot be imported here
            raise ToolNotAvailable(f"{claimed['name']} is not available on its worker.") from error
        tools = agent.tools_by_name
        if claimed["name"] not in tools and agent.tool_functions:
            return _asked_for(agent, claimed)
        if claimed["name"] not in tools:
            raise UnknownTool(claimed["name"], tools)
        return tools[claimed["name"]]

    def hooks(self, claimed: Mapping[str, Any]) -> tuple[Hooks, ...]:
        return tuple(agents.get(claimed["agent"]).hooks)
