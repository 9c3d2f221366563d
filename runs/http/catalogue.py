"""What can be run here: the agents and their tools, and what it has cost."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from django.db.models import Count, Sum
from django.db.models.functions import TruncDate
from pydantic import BaseModel, Field
from rest_framework.request import Request
from rest_framework.response import Response

from runs import agents
from runs.access import visible
from runs.http import answers
from runs.http.query import Query, Text
from runs.http.view import SIGNED_IN, View, operation
from runs.models import Usage
from threads import clock
from tools.registry import Tool

LOOKED_BACK = timedelta(days=30)


class Agents(View):
    @operation(SIGNED_IN, name="list_agents", answers={200: answers.Agents})
    def get(self, request: Request) -> Response:
        """List the agents that this project defines."""
        return Response({"results": [answers.agent(each) for each in agents.registry.all().values()]})


class Tools(View):
    @operation(SIGNED_IN, name="list_tools", answers={200: answers.Tools})
    def get(self, request: Request) -> Response:
        """List the tools of these agents, with the schema of their arguments."""
        found: dict[int, tuple[Tool[..., Any], list[str]]] = {}
        for agent in agents.registry.all().values():
            for tool in agent.tools_by_name.values():
                found.setdefault(id(tool), (tool, []))[1].append(agent.name)
        shown = [answers.tool(tool, of) for tool, of in found.values()]
        return Response({"results": sorted(shown, key=lambda tool: (tool["name"], tool["agents"]))})


class UsageQuery(Query):
    since: Annotated[datetime | None, Field(description="default: 30 days ago")] = None
    until: Annotated[datetime | None, Field(description="default: now")] = None
    agent: list[Text] = []
    by: Annotated[Literal["agent", "model", "day"], Field(description="what the sums are made by")] = "agent"


class UsageRow(BaseModel):
    """Sums over model calls, those of discarded messages too. `cost` counts those whose price is known."""

    agent: str | None = None
    model: str | None = None
    day: str | None = None
    model_calls: int
    runs: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    cost: str


class UsageSums(BaseModel):
    results: list[UsageRow]


class UsageOverview(View):
    @operation(SIGNED_IN, name="get_usage", query=UsageQuery, answers={200: UsageSums})
    def get(self, request: Request, query: UsageQuery) -> Response:
        """Sum up what your runs' model calls have used, by agent, model or day (UTC)."""
        now = clock.now()
        rows = visible(Usage, request.user).filter(
            created_at__gte=_aware(query.since) or now - LOOKED_BACK, created_at__lt=_aware(query.until) or now
        )
        if query.agent:
            rows = rows.filter(run__agent__in=query.agent)
        by: Any = {"agent": "run__agent", "model": "model", "day": "day"}[query.by]
        if query.by == "day":
            rows = rows.annotate(day=TruncDate("created_at", tzinfo=UTC))
        sums = ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens", "cost")
        summed = rows.values(by).annotate(
            model_calls=Count("id"), runs=Count("run", distinct=True), **{f"sum_{name}": Sum(name) for name in sums}
        )
        return Response({"results": [_row(query.by, by, row) for row in summed.order_by(by)]})


def _row(by: str, column: str, row: dict[str, Any]) -> dict[str, Any]:
    counted = {
        name: row[f"sum_{name}"] or 0 for name in ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens")
    }
    return {
        "agent": None,
        "model": None,
        "day": None,
        by: str(row[column]),
        "model_calls": row["model_calls"],
        "runs": row["runs"],
        **counted,
        "cost": answers.plain(row["sum_cost"] or 0),
    }


def _aware(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment
