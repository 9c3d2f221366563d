"""The page of agents: definitions in code, as this process has found them. They have no rows, so nothing is edited."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from runs import agents
from runs.agents import Agent
from runs.conf import settings
from runs.models import Run
from threads.admin import marks
from tools.hooks import name_of
from tools.registry import Tool

if TYPE_CHECKING:
    from django.contrib.admin import ModelAdmin


def agents_page(request: HttpRequest, model_admin: ModelAdmin[Run]) -> HttpResponse:
    context = {
        **model_admin.admin_site.each_context(request),
        "title": "Agents",
        "opts": model_admin.opts,
        "media": model_admin.media,
        "agents": [_shown(model_admin, each) for each in agents.registry.all().values()],
        "broken": [(module, f"{type(error).__name__}: {error}") for module, error in agents.registry.broken().items()],
    }
    return TemplateResponse(request, "admin/longhaul_runs/agents.html", context)


def _shown(model_admin: ModelAdmin[Run], agent: Agent) -> dict[str, Any]:
    default = settings().default_model
    return {
        "name": agent.name,
        "runs": marks.list_url(model_admin.admin_site, Run, agent=agent.name),
        "model": agent.model or (f"{default} (DEFAULT_MODEL)" if default else "none"),
        "instructions": _instructions(agent),
        "limits": marks.pretty(dict(agent.limits)),
        "context": marks.pretty(dict(agent.context)),
        "options": marks.pretty(dict(agent.options)),
        "tool_choice": agent.tool_choice,
        "tools": [_tool(each) for each in agent.tools_by_name.values()],
        "tool_functions": [f"{name_of(each)}()" for each in agent.tool_functions],
    }


def _instructions(agent: Agent) -> str:
    """Return the text, or the name of the function that makes it for each run."""
    given = agent.instructions
    if isinstance(given, str):
        return marks.text(given) if given else marks.NOTHING
    name = getattr(given, "__qualname__", type(given).__name__)
    module = getattr(inspect.getmodule(given), "__name__", "")
    return marks.code(f"{module}.{name}()" if module else f"{name}()")


def _tool(tool: Tool) -> dict[str, Any]:
    tries = tool.retry.attempts
    does = [f"{marks.span(tool.timeout)} an attempt", f"{tries} attempt{'' if tries == 1 else 's'}"]
    does += ["atomic"] if tool.atomic else []
    does += [] if tool.idempotent is None else ["idempotent" if tool.idempotent else "starts at most once"]
    does += ["needs approval"] if tool.needs_approval else []
    does += ["deferred"] if tool.deferred else []
    does += [f"shown in its {tool.in_context} only"] if tool.in_context != "thread" else []
    does += [f"{len(tool.hooks)} hook{'' if len(tool.hooks) == 1 else 's'}"] if tool.hooks else []
    does += [f"queue {tool.queue}"] if tool.queue else []
    return {
        "name": tool.name,
        "description": tool.description,
        "does": ", ".join(does),
        "schema": marks.schema(tool.parameters),
    }
