"""What the README and the pages of docs/ say is tried: their code runs, their commands show what is shown, their tables
are those of the code."""

from __future__ import annotations

import inspect
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.management import BaseCommand, get_commands, load_command_class

from agents_project import embedded
from agents_project.demo import scripts
from agents_project.demo.agents import JOB
from agents_project.demo.model_server import ModelCall, ModelServer, Reply, Text, ToolCall
from agents_project.demo.verdict import judge
from agents_project.demo.view import DemoView
from agents_project.settings import database_from_url
from runs import agents, conf
from runs.invariants import INVARIANTS
from runs.models import Event, Run, Status, StopReason
from runs.pytest_longhaul import call, run_to_end, scripted
from tests.docs import console
from tests.docs.page import PAGES, ROOT, Block, blocks, code, shows, table, text, words
from threads.models import Thread
from tools.registry import tool

BUILT = ("docs/quickstart.md", "docs/testing.md")  # pages whose blocks make up a project of their own
HERE = [page for page in PAGES if page not in BUILT]
WITH_CODE = [page for page in HERE if any(block.kind == "python" for block in blocks(page))]


# --- the pages as text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_tried(page: str) -> None:
    fences = text(page).count("\n```")
    found = blocks(page)
    assert fences == 2 * sum(block.kind != "test" for block in found), "a fence was not read"
    for block in found:
        assert block.kind in {"console", "python", "toml", "text", "ini", "nginx", "sql", "js", "html", "test"}, block
        if block.kind in {"ini", "nginx", "sql", "js", "html"}:
            assert block.told.startswith("tried by "), block
        if page == "README.md" and block.kind == "text":
            assert max(map(len, block.body.splitlines())) <= 80, block


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_to_what_is_there(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", text(page)):
        assert (folder / link).exists(), link
    for path in re.findall(r"`((?:tests|runs|tools|threads|agents_project|benchmarks)/[\w/.]+)`", text(page)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_what_is_tried_by_a_test_is_taken_from_the_page_by_it(page: str) -> None:
    for block in blocks(page):
        where = block.told.removeprefix("tried by ")
        if where != block.told:
            path, _, name = where.partition("::")
            source = (ROOT / path).read_text()
            assert f"def {name}(" in source, block
            assert f'"{page}"' in source, block


def told(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.kind == "console" and block.told]


@pytest.mark.parametrize("block", [block for page in PAGES for block in told(page)], ids=str)
def test_a_command_that_is_not_run_here_is_run_by_the_test_that_is_named(block: Block) -> None:
    where = block.told.removeprefix("covered by ")
    if where == block.told:
        assert re.match(r"not run: .+|tried by .+|workers$|in the quickstart's project$|in a shell$", where), where
        return
    path, _, name = where.partition("::")
    source = (ROOT / path).read_text()
    for command, _ in block.commands:
        if name:
            assert f"def {name}(" in source, where
        else:
            assert f"\n{command}\n" in source, where
        # A target of make comes down to what that test runs, and is there.
        assert words(command)[0] == "make"
        answer = subprocess.run(["make", "-n", *words(command)[1:]], cwd=ROOT, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        runs = {
            "demo": "manage.py demo",
            "clean": "agents_project.embedded remove --all",
            "dev": "agents_project.dev",
            "test": "-m pytest",
        }
        assert runs[words(command)[1]] in answer.stdout


@pytest.mark.django_db
def test_what_the_readme_shows_of_the_demo_is_what_the_demo_says() -> None:
    shown = next(block for block in blocks("README.md") if block.kind == "text").body
    story, _, claims = re.sub(r"\n {12}(?!\.\.\.)", " ", shown).partition("\nWhat the database says:\n")
    # The claims are those that the demo checks
    checked = {claim.text for claim in judge(_a_run(), [], [], 0, timedelta()).claims}
    assert {re.sub(r"^  yes  | \([^()]*\)$", "", line) for line in claims.splitlines()} <= checked
    # The lines are those of its view, told such a run
    lines = [line for line in story.splitlines() if line.strip() != "..."]
    said = set(_told_of_a_run_with_two_kills())
    assert [line for line in lines if line not in said] == []


def _a_run() -> Run:
    return Run.objects.create(thread=Thread.objects.create(), agent="tester")


def _told_of_a_run_with_two_kills() -> Iterator[str]:
    """Yield what the demo's view says of the events that the README shows, at the README's times."""
    begin = datetime(2026, 11, 21, 7, 0, tzinfo=UTC)
    view = DemoView("r", agent="tester", since=begin, expected=50)

    def tell(after: float, type: str, **fields: Any) -> list[str]:
        return view.apply({"type": type, "at": (begin + timedelta(seconds=after)).isoformat(), **fields})

    def at(after: float) -> datetime:
        return begin + timedelta(seconds=after)

    def a_call(id: str, number: int, after: float, name: str = "test_tool") -> None:
        tell(after, "tool_call.created", tool_call=id, name=name, message="m", arguments={"number": number})

    job = [{"type": "text", "text": JOB.format(first=1, last=50)}]
    yield from tell(0.01, "message.completed", message="u", role="user", content=job)
    yield from tell(0.21, "leg.started", leg=1, epoch=1, worker="agents-1@h")
    yield from tell(0.3, "message.created", message="m1", role="assistant", step=1)
    yield from tell(0.45, "text.delta", message="m1", text="Testing 1 of 50.")
    yield from tell(0.45, "message.completed", message="m1", role="assistant", step=1, content=[])
    a_call("c1", 1, 0.45)
    yield from tell(0.53, "tool_call.started", tool_call="c1", name="test_tool", attempt=1, worker="tools-1@h")
    result = {"value": 1, "number": 1}
    yield from tell(0.81, "tool_call.settled", tool_call="c1", name="test_tool", outcome="success", result=result)
    yield from tell(4.41, "leg.ended", leg=1, epoch=1, reason="budget")
    yield from tell(4.43, "leg.started", leg=2, epoch=2, worker="agents-1@h")
    yield from tell(8.68, "leg.started", leg=3, epoch=3, worker="agents-2@h")
    yield from view.killed("agents", "agents-2", 16822, at(8.80), "while it streamed step 20", "agents-3")
    yield from tell(8.7, "message.created", message="m20", role="assistant", step=20)
    yield from tell(8.99, "text.delta", message="m20", text="Tes")
    yield from tell(8.99, "message.discarded", message="m20", role="assistant", step=20, reason="lost")
    yield from tell(9.018, "leg.started", leg=4, epoch=5, worker="agents-1@h")
    yield from tell(9.05, "message.created", message="m21", role="assistant", step=20)
    yield from tell(9.19, "text.delta", message="m21", text="Testing 20 of 50.")
    yield from tell(9.19, "message.completed", message="m21", role="assistant", step=20, content=[])
    a_call("c30", 30, 13.47)
    yield from view.killed("tools", "tools-1", 16805, at(13.588), "in the middle of test_tool(number=30)", "tools-2")
    lost = {"code": "worker_lost"}
    yield from tell(13.85, "tool_call.retrying", tool_call="c30", name="test_tool", attempt=2, error=lost)
    yield from tell(14.514, "tool_call.started", tool_call="c30", name="test_tool", attempt=2, worker="tools-2@h")
    yield from tell(23.3, "message.created", message="m51", role="assistant", step=51)
    yield from tell(23.43, "text.delta", message="m51", text="The total is 1275.")
    yield from tell(23.43, "message.completed", message="m51", role="assistant", step=51, content=[])
    yield from tell(23.43, "run.completed", stop_reason="end_turn", output="The total is 1275.")


# --- tables, beside the code that they tell of ----------------------------------------------------------------------


def test_defaults_told_in_running_text_are_those_of_the_settings() -> None:
    now = conf.KEYS
    said = {
        "docs/agents.md": {
            r"After (\d+) steps in a row": "BAD_CALLS_LIMIT",
            r"After (\d+) tries": "MODEL_TRIES",
            r"Default (\d+) \|\n": "MAX_STEPS",
            r"default (\d+)\. A model call": "LEG_BUDGET_SECONDS",
            r"the last (\d+) messages": "CONTEXT_MESSAGES",
        },
        "docs/durability.md": {
            r"waits up to (\d+) s\n": "LINGER_SECONDS",
            r"no beat for (\d+) s": "PRESENCE_TTL_SECONDS",
            r"taken back (\d+) times": "POISON_LIMIT",
            r"streams run for (\d+) s": "DRAIN_GRACE_SECONDS",
        },
    }
    for page, patterns in said.items():
        for pattern, key in patterns.items():
            found = re.search(pattern, text(page))
            assert found, (page, pattern)
            assert int(found[1]) == now[key].default, key


def test_the_options_of_a_tool_are_all_there_with_their_defaults() -> None:
    rows = {code(option)[0]: default for option, default, _ in table("docs/tools.md", "Options")}
    parameters = inspect.signature(tool).parameters
    assert list(rows) == [
        "name", "description", "timeout_seconds", "retry", "idempotent", "on_unknown", "on_deploy", "atomic",
        "queue", "max_concurrency", "rate_limit", "strict", "hooks", "in_context", "needs_approval", "deferred",
    ]  # fmt: skip
    assert set(rows) == set(parameters) - {"function"}
    for name in ("timeout_seconds", "idempotent", "atomic", "strict", "needs_approval", "deferred"):
        assert rows[name].strip("`") == str(parameters[name].default)


def test_the_arguments_of_an_agent_and_of_start_are_all_there() -> None:
    from runs import admission

    rows = {name for row in table("docs/agents.md", "Agents") for name in code(row[0])}
    assert rows == {field.name for field in fields(agents.Agent)}
    given = {name for row in table("docs/agents.md", "Starting a run") for name in code(row[0])}
    assert given == set(inspect.signature(admission.start).parameters) - {"agent", "input", "parent", "origin", "told"}


def test_the_commands_and_their_options_are_all_there() -> None:
    ours = {name for name, app in get_commands().items() if app in ("runs", "agents_project.demo")}
    usual = BaseCommand().create_parser("manage.py", "none")._option_string_actions
    rows = {code(row[0])[0].split()[0]: code(row[0])[0] for row in table("docs/operations.md", "Commands")}
    assert set(rows) == ours
    for name, usage in rows.items():
        parser = load_command_class(get_commands()[name], name).create_parser("manage.py", name)
        own = {option for option in parser._option_string_actions if option.startswith("--") and option not in usual}
        assert set(re.findall(r"--[\w-]+", usage)) == own, name


def test_the_states_and_stop_reasons_are_all_there() -> None:
    states = [name for row in table("docs/durability.md", "States") for name in code(row[0])]
    assert sorted(states) == sorted(Status.values)
    reasons = [name for row in table("docs/durability.md", "States", 1) for name in code(row[1])]
    assert sorted(reasons) == sorted(StopReason.values)
    numbers = re.findall(r"^(\d)\. ", text("docs/durability.md").split("## The invariants")[1], re.MULTILINE)
    assert numbers == list(INVARIANTS)


def documented_events() -> dict[str, set[str]]:
    """Return the fields of each type that docs/events.md lists."""
    found: dict[str, set[str]] = {}
    for types, about in table("docs/events.md", "Types"):
        # After a colon stand the values of a field; after `with` another field.
        names = {name for part in about.split(";") for name in code(re.sub(r":[^;]*", "", part))}
        names |= set(code(about.partition("also")[2]))
        found |= dict.fromkeys(code(types), names)
    return found


def test_every_type_of_event_that_the_code_writes_is_there() -> None:
    sources = [path for app in ("runs", "tools") for path in (ROOT / app).glob("*.py")]
    sources += [path for app in ("runs", "tools") for path in (ROOT / app / "sql").glob("*.sql")]
    kinds = r"['\"]((?:run|leg|message|text|reasoning|tool_call)\.[a-z_]+|usage|data|error|resume_gap)['\"]"
    verbs = r"['\"]?action['\"]?[=:] ?['\"][\w.]+['\"]"  # of the log of a process: no events
    written = {type for path in sources for type in re.findall(kinds, re.sub(verbs, "", path.read_text()))}
    written |= {f"run.{status}" for status in Status.values if status not in ("queued", "running")}
    assert written == set(documented_events())


# --- Python ---------------------------------------------------------------------------------------------------------


def support(messages: list[dict[str, Any]]) -> Any:
    """Look up the order that the user last asked about, then say how it is; another tool's result, or none, is "Hello."."""
    results: list[Any] = []
    prompt = ""
    for message in reversed(messages):
        if message["role"] == "user":
            prompt = str(message["content"])
            break
        if message["role"] == "tool":
            results.append(message["content"][0].get("result"))
    number = re.search(r"10\d\d", prompt)
    if number is None:
        return "Hello."
    if not results:
        return call("look_up_order", number=int(number[0]))
    return f"Order {results[0]['number']} is {results[0]['state']}."


@pytest.fixture
def register() -> Iterator[Callable[[agents.Agent], agents.Agent]]:
    """Make an agent known, as `agents.py` would; undone afterwards."""
    agents.registry.discover()
    before = dict(agents.registry._agents)
    yield agents.registry.add
    agents.registry._agents.clear()
    agents.registry._agents.update(before)


@pytest.mark.django_db
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page: str, register: Callable[[agents.Agent], agents.Agent]) -> None:
    with scripted() as model:
        model.answer = support
        names: dict[str, Any] = {
            "__name__": "shop.agents",
            "run_to_end": run_to_end,
            "call": call,
            "register": register,
        }
        names["scripted_model"] = model
        for block in blocks(page):
            if block.kind not in ("python", "test") or block.told == "in a shell" or block.told.startswith("tried by "):
                continue
            # Empty lines in front, so that a traceback tells the line of the page.
            source = "\n" * (block.line - 1) + block.body
            exec(compile(source, str(ROOT / page), "exec"), names)
            for value in list(names.values()):
                if isinstance(value, agents.Agent):
                    register(value)
    _events_are_as_documented((event.type, event.payload) for event in Event.objects.all())


def _events_are_as_documented(events: Any) -> None:
    known = documented_events()
    for type, payload in events:
        assert type in known, type
        assert set(payload) <= known[type], (type, payload)


# --- console: this repository ---------------------------------------------------------------------------------------


@pytest.fixture
def own_servers() -> Iterator[str]:
    """A purpose of these tests' own: its embedded servers stand apart from those of the session."""
    purpose = embedded.reserve("test-docs")
    yield purpose
    embedded.remove(purpose, force=True)


@pytest.mark.slow
@pytest.mark.timeout(300)  # servers and workers start, some 15 commands of about 2 s follow
def test_the_commands_for_this_repository_show_what_the_pages_show(own_servers: str, tmp_path: Path) -> None:
    found = [block for page in HERE for block in blocks(page) if block.kind == "console"]
    starts = [block for block in found if block.told == "workers"]
    assert len({block.body for block in starts}) == 1, "the pages start other workers"
    with ModelServer(scripts.demo) as model:
        shell = console.environment(LONGHAUL_PURPOSE=own_servers, OPENAI_BASE_URL=model.url, OPENAI_API_KEY="none")
        url = embedded.urls(own_servers).database_url
        # Given servers that stay up for all that follows, and the tables
        holding = [f"{console.BIN}/python", "-m", "agents_project.embedded", "exec", "--", "sleep", "290"]
        servers = subprocess.Popen(holding, cwd=ROOT, env=shell)
        try:
            _manage(shell, "migrate", "--verbosity", "0")
            _a_run_without_workers_is_explained_as_shown(shell)
            # When the workers of the pages run
            with console.workers(starts[0], ROOT, shell, database_url=url, logs_in=tmp_path):
                # Then every command shows what its page shows
                for block in found:
                    if not block.told:
                        console.run(block, ROOT, shell)
            with psycopg.connect(url) as connection:
                _events_are_as_documented(
                    connection.execute("SELECT type, payload FROM longhaul_runs_event").fetchall()
                )
        finally:
            servers.terminate()
            servers.wait(timeout=30)


def _manage(shell: dict[str, str], *arguments: str) -> str:
    command = [f"{console.BIN}/python", "manage.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=shell, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _a_run_without_workers_is_explained_as_shown(shell: dict[str, str]) -> None:
    [shown] = [
        block.body for block in blocks("docs/operations.md") if block.kind == "text" and block.body.startswith("Why: ")
    ]
    run = re.search(r"Run (\S+)", _manage(shell, "run_agent", "tester", "Hello"))
    assert run
    until = time.monotonic() + 30
    while "no agents worker is present" not in (said := _manage(shell, "explain_run", run[1])):
        assert time.monotonic() < until, said  # it is patient with a run for its first 3 s
    span = re.compile(r"\d+(\.\d)? s\b")
    assert "\n" + span.sub("_", shown) in span.sub("_", said)


# --- console: a project of one's own --------------------------------------------------------------------------------


def order_desk(call: ModelCall) -> Reply:
    """Stands in for the service that the quickstart's agent asks."""
    if call.messages[-1]["role"] == "tool":
        return [Text("Order 1042 is shipped.")]
    return [ToolCall("look_up_order", {"number": 1042})]


@pytest.fixture
def shop(servers: embedded.Servers) -> Iterator[dict[str, str]]:
    """The environment of a shop's project: a database of its own on the session's servers, and a broker's number."""
    here = database_from_url(servers.database_url)
    variables = {"PGHOST": "HOST", "PGPORT": "PORT", "PGUSER": "USER", "PGPASSWORD": "PASSWORD"}
    redis, broker = (
        re.sub(r"(db=|virtual_host=|:\d+/)\d+", r"\g<1>7", url) for url in (servers.redis_url, servers.broker_url)
    )
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS shop WITH (FORCE)")
        connection.execute("CREATE DATABASE shop")
        yield console.environment(
            **{name: str(here[key]) for name, key in variables.items() if here[key]},
            REDIS_URL=redis,
            CELERY_BROKER_URL=broker,
            OPENAI_API_KEY="none",
        )
        connection.execute("DROP DATABASE IF EXISTS shop WITH (FORCE)")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_quickstart_makes_a_project_whose_agent_runs_and_is_tested(
    shop: dict[str, str], servers: embedded.Servers, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    quickstart, testing = (blocks(page) for page in BUILT)
    url = re.sub(r"^(postgres(?:ql)?://[^/]*/)[^?]*", r"\1shop", servers.database_url)
    with ModelServer(order_desk) as model:
        shell = {**shop, "OPENAI_BASE_URL": model.url}
        # Given the project of the page
        start = next(n for n, block in enumerate(quickstart) if block.told == "workers")
        for block in quickstart[:start]:
            _follow(block, folder, shell)
        # When its workers run, the commands after them show what they show
        with console.workers(quickstart[start], folder, shell, database_url=url, logs_in=tmp_path):
            for block in quickstart[start + 1 :]:
                _follow(block, folder, shell)
    # And the tests of the page on testing pass there
    for block in testing:
        _follow(block, folder, shop)


def _follow(block: Block, folder: Path, shell: dict[str, str]) -> None:
    """Do what the reader of a page does: write the file, or run the commands."""
    if block.kind in ("python", "toml"):
        assert block.file, f"{block} names no file"
        path = folder / block.file
        path.write_text(path.read_text() + block.body if block.adds else block.body)
    elif block.kind == "console" and not block.told.startswith("not run:"):
        console.run(block, folder, shell)


@pytest.mark.parametrize(
    ("expected", "output", "same"),
    [
        ("a\n", "a\n", True),
        ("a\n...\nc\n", "a\nb\nc", True),
        ("...\nc", "c", True),
        ("a", "b", False),
        ("a\n...", "b\na", False),
    ],
)
def test_output_is_compared_with_what_is_shown(expected: str, output: str, same: bool) -> None:
    assert shows(expected, output) is same
