"""The audit: what its tools read of a package, what the scripted model makes of it, and what the command refuses."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from agents_project.demo import audit, report, scripts, source
from agents_project.demo.agents import AUDIT_JOB, auditor
from agents_project.demo.model_server import ModelCall, Text, ToolCall
from agents_project.demo.verdict import judge_audit
from runs.models import Run
from runs.pytest_longhaul import call, run_to_end, scripted
from tools import ModelRetry
from tools.models import ToolCall as Row

TOOLS = {tool.name: tool for tool in audit.TOOLS}

FILES = {
    "shopkit/__init__.py": '"""A shop."""\n__all__ = ["open_shop"]\n\n\ndef open_shop():\n    pass\n\n\ndef hidden():\n    pass\n',
    "shopkit/orders.py": (
        "import json\nimport os.path\nimport nowhere\nfrom . import stock\n"
        "try:\n    import fast_json\nexcept ImportError:\n    fast_json = None\n"
        "raise RuntimeError('nobody runs this')\n"
        "class Order:\n"
        '    """One order."""\n'
        "    def pay(self):\n        pass\n"
        "    @property\n"
        "    def total(self):\n"
        '        """What it costs."""\n'
        "    @total.setter\n"
        "    def total(self, value):\n        pass\n"
        "    @override\n"
        "    def ship(self):\n        pass\n"
        "    @typing.overload\n"
        "    def pack(self, at: int): ...\n"
        "    def pack(self, at):\n"
        '        """Pack it."""\n'
        "    def _secret(self):\n        pass\n"
        "def place():\n" + "    pass\n" * 60 + "def _private():\n    import lazy_one\n"
    ),
    "shopkit/stock/__init__.py": "",
    "shopkit/stock/shelf.py": "import kombu\nasync def count():\n    '''How many.'''\n    def inner():\n        pass\n",
    "shopkit/stock/old.py": "print 'Python 2'\n",
    "shopkit/not-a-module.py": "x = (",
    "shopkit/table.txt": "def no(): pass\n",
}
METADATA = """Metadata-Version: 2.1
Name: Shop-Kit
Version: 1.4
Summary: Keeps a shop
License: MIT
Requires-Dist: kombu>=5
Requires-Dist: fast.json; extra == "fast"
Requires-Python: >=3.11
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, in which shopkit is the only one of ours."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    about = tmp_path / "shop_kit-1.4.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(METADATA)
    (about / "RECORD").write_text("".join(f"{name},,\n" for name in [*FILES, "../../bin/shop.py"]))
    (about / "top_level.txt").write_text("shopkit\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    source.importers.cache_clear()
    yield tmp_path
    source.importers.cache_clear()


# --- finding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shop-kit", "Shop_Kit", "shopkit", " shopkit "])
def test_a_package_is_found_by_the_name_of_its_distribution_and_by_what_one_imports(site: Path, name: str) -> None:
    package = source.find(name)
    assert (package.name, package.version, package.license, package.roots) == ("Shop-Kit", "1.4", "MIT", ("shopkit",))
    assert [each.module for each in package.files] == [
        "shopkit", "shopkit.orders", "shopkit.stock", "shopkit.stock.old", "shopkit.stock.shelf",
    ]  # fmt: skip
    # And nothing of it was run: it would raise
    assert not [module for module in sys.modules if module.startswith("shopkit")]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("shopkitt", "The package 'shopkitt' is not installed here. Did you mean shopkit"),
        ("celry", "Did you mean celery?"),
        ("no-such-thing-at-all", "is not installed here. Those that are: "),
        ("django.contrib", "name a whole package, as Django is."),
        ("sys", "built into Python"),
        ("../../etc/passwd", "is not installed here"),
        ("", "No package is named."),
    ],
)
def test_what_is_not_installed_is_answered_with_what_comes_close(site: Path, name: str, said: str) -> None:
    with pytest.raises(source.NotFound) as caught:
        source.find(name)
    assert said in str(caught.value)
    # And a model that names it gets the same words, to try again with
    with pytest.raises(ModelRetry) as refused:
        audit.list_modules(name)
    assert str(refused.value) == str(caught.value)


def test_what_is_left_of_a_package_that_was_half_removed_has_no_name_and_does_no_harm(site: Path) -> None:
    left = site / "~hop_kit-1.3.dist-info"
    left.mkdir()
    (left / "top_level.txt").write_text("shopkit\n")
    assert source.find("shopkit").version == "1.4"
    with pytest.raises(source.NotFound, match="Did you mean shopkit"):
        source.find("shopkitt")
    assert audit.imports("shopkit")["others"]["count"] == 4


def test_the_finder_of_an_editable_install_is_not_its_package(site: Path) -> None:
    finder = site / "__editable___linked_1_0_finder.py"
    finder.write_text("def find(): pass\n")
    about = site / "linked-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: linked\nVersion: 1.0\n")
    (about / "RECORD").write_text(f"{finder.name},,\n")
    with pytest.raises(source.NotFound, match="linked is installed, but has no Python source there"):
        source.find("linked")


def test_a_module_of_python_itself_is_a_package_too() -> None:
    assert [each.module for each in source.find("json").files] == [
        "json", "json.decoder", "json.encoder", "json.scanner", "json.tool",
    ]  # fmt: skip


# --- the tools ------------------------------------------------------------------------------------------------------


def test_the_tools_tell_what_the_files_hold(site: Path) -> None:
    facts = audit.package_facts("shopkit")
    assert (facts["modules"], facts["requirements"]["names"]) == (5, ["kombu"])
    assert facts["requirements_of_extras"]["names"] == ["fast-json"]
    assert facts["lines"] == sum(FILES[f"shopkit/{name}"].count("\n") for name in (
        "__init__.py", "orders.py", "stock/__init__.py", "stock/shelf.py", "stock/old.py",
    ))  # fmt: skip
    listed = audit.list_modules("shopkit")
    assert [(part["name"], part["modules"]) for part in listed["parts"]["largest"]] == [
        ("shopkit.orders", 1), ("shopkit.__init__", 1), ("shopkit.stock", 3),
    ]  # fmt: skip


def test_public_names_without_docstrings_are_counted_by_the_rules_that_are_told(site: Path) -> None:
    # `hidden` is not in __all__; the module has a docstring
    assert audit.undocumented("shopkit", "shopkit.__init__") == {
        "module": "shopkit.__init__",
        "modules": 1,
        "public": 2,
        "undocumented": 1,
        "by_kind": {"function": 1},
        "examples": ["shopkit.open_shop"],
    }
    # the module, `Order`, `pay`, `total` and `pack` (once), `place`; `ship` has its words elsewhere; nothing with an underscore
    orders = audit.undocumented("shopkit", "shopkit.orders")
    assert (orders["public"], orders["by_kind"]) == (6, {"function": 1, "method": 1, "module": 1})
    assert orders["examples"] == ["shopkit.orders.place", "shopkit.orders.Order.pay"]
    # a part means all below it; what cannot be parsed is told; what is nested is nobody's interface
    stock = audit.undocumented("shopkit", "shopkit.stock")
    assert (stock["modules"], stock["public"]) == (3, 3)
    assert stock["unread"] == {"count": 1, "files": ["shopkit/stock/old.py"]}
    # and the whole is the sum of its parts
    whole = audit.undocumented("shopkit")
    parts = [audit.undocumented("shopkit", part.name) for part in source.parts(source.find("shopkit"))]
    for key in ("modules", "public", "undocumented"):
        assert whole[key] == sum(part[key] for part in parts)


def test_the_largest_functions_are_told_with_their_places(site: Path) -> None:
    found = audit.largest_functions("shopkit", count=2)
    line = FILES["shopkit/orders.py"].splitlines().index("def place():") + 1
    assert found["largest"][0] == {"name": "shopkit.orders.place", "lines": 61, "at": f"shopkit/orders.py:{line}"}
    assert len(found["largest"]) == 2
    assert (found["functions"], found["over_50_lines"]) == (13, 1)


def test_imports_are_told_with_how_they_are_declared_and_guarded(site: Path) -> None:
    found = audit.imports("shopkit")
    assert found["standard_library"] == {"count": 2, "names": ["json", "os"]}
    assert found["others"]["listed"] == [
        {"name": "nowhere", "declared": "no", "modules": 1, "unguarded": 1},
        {"name": "fast_json", "declared": "extra", "modules": 1, "unguarded": 0},
        {"name": "kombu", "declared": "required", "modules": 1, "unguarded": 1},
        {"name": "lazy_one", "declared": "no", "modules": 1, "unguarded": 0},
    ]


def test_imports_under_a_condition_are_guarded_however_deep_it_is(site: Path) -> None:
    deep = " + ".join(["1"] * 1500)
    (site / "shopkit/stock/shelf.py").write_text(
        f"if {deep}:\n    import kombu\nif typing.TYPE_CHECKING:\n    import nowhere\n"
    )
    listed = audit.imports("shopkit", "shopkit.stock")["others"]["listed"]
    assert {each["name"]: each["unguarded"] for each in listed} == {"kombu": 0, "nowhere": 0}


def test_an_unknown_module_is_answered_with_those_that_come_close(site: Path) -> None:
    with pytest.raises(ModelRetry, match=r"has no module 'shopkit\.order'; there are shopkit\.orders"):
        audit.undocumented("shopkit", "shopkit.order")


@pytest.mark.slow
def test_what_the_tools_answer_stays_small_however_large_the_package_is() -> None:
    """Django has about 900 modules: only its lists are cut, its counts are whole."""
    assert len(source.find("django").files) > 800
    for name in ("package_facts", "list_modules", "undocumented", "imports", "largest_functions"):
        result = TOOLS[name](package="django")
        assert len(json.dumps(result)) < 4000, name


def test_the_tools_may_run_again_and_are_described_for_a_model() -> None:
    for tool in auditor.tools_by_name.values():
        assert tool.idempotent is True
        assert tool.description
        for about in tool.parameters["properties"].values():
            assert about["description"]


# --- the scripted model ---------------------------------------------------------------------------------------------


def talk(package: str, change: Callable[[str, Any], Any] = lambda name, result: result) -> tuple[str, list[list[Any]]]:
    """Let the script talk with the tools; return what it says last, and the calls of each of its steps."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": AUDIT_JOB.format(package=package)}]
    offered = [{"function": {"name": name}} for name in TOOLS]
    steps: list[list[Any]] = []
    for number in range(1, 30):
        reply = scripts.demo(ModelCall({"messages": messages, "tools": offered}, number, {}))
        calls = [action for action in reply if isinstance(action, ToolCall)]
        said = "".join(action.text for action in reply if isinstance(action, Text))
        if not calls:
            return said, steps
        steps.append([(each.name, each.arguments) for each in calls])
        asked = [
            {"id": f"{number}-{n}", "function": {"name": each.name, "arguments": json.dumps(each.arguments)}}
            for n, each in enumerate(calls)
        ]
        messages.append({"role": "assistant", "content": said, "tool_calls": asked})
        for one, each in zip(asked, calls, strict=True):
            assert isinstance(each.arguments, dict)
            try:
                content = json.dumps(change(each.name, TOOLS[each.name](**each.arguments)))
            except ModelRetry as error:
                content = str(error)
            messages.append({"role": "tool", "tool_call_id": one["id"], "content": content})
    raise AssertionError("it does not end")


def test_the_model_asks_for_several_tools_at_once_and_looks_at_every_part(site: Path) -> None:
    _, steps = talk("shopkit")
    assert [[name for name, _ in step] for step in steps] == [
        ["package_facts", "list_modules"],
        ["largest_functions", "imports", "undocumented", "undocumented", "undocumented"],
    ]
    said, steps = talk("celery")
    assert [len(step) for step in steps] == [2, 5, 5, 5, 7]
    looked = [arguments["module"] for step in steps for name, arguments in step if name == "undocumented"]
    assert looked == [part["name"] for part in audit.list_modules("celery")["parts"]["largest"][: scripts.AUDITED]]
    # And the worst parts stand first in the report
    without = [int(row) for row in re.findall(r"^\| `celery.*\| ([\d,]+) \| \d+% \|$", said, re.MULTILINE)]
    assert len(without) == report.ROWS
    assert without == sorted(without, reverse=True)
    assert len(audit.undocumented("celery")["examples"]) == audit.EXAMPLES


def test_the_report_has_the_numbers_of_the_results_and_what_to_do_about_them(site: Path) -> None:
    said, _ = talk("shopkit")
    assert said.startswith("# Audit of Shop-Kit 1.4\n")
    whole = audit.undocumented("shopkit")
    assert f"{whole['undocumented']} of {whole['public']} public names have none" in said
    assert "| `shopkit.orders` | 1 | 6 | 3 | 50% |" in said
    assert "| 61 | `orders.place` | shopkit/orders.py:" in said
    assert "Imported at once, not among the requirements: nowhere." in said
    assert "1 file could not be parsed." in said
    assert "1. Document `shopkit.orders`: 3 of its 6 public names say nothing, `orders.place` among them." in said
    assert "2. Split `orders.place`" in said
    assert "3. Declare `nowhere`, or guard its import" in said


def test_the_report_is_made_of_the_messages_and_of_nothing_else(site: Path) -> None:
    def wrong(name: str, result: Any) -> Any:
        return {**result, "undocumented": 1000, "public": 2000} if name == "undocumented" else result

    said, steps = talk("shopkit", wrong)
    looked = sum(name == "undocumented" for step in steps for name, _ in step)
    assert f"{looked * 1000:,} of {looked * 2000:,} public names have none (50%)." in said


def test_a_package_that_is_not_there_ends_in_a_refusal_with_the_tools_words() -> None:
    said, steps = talk("celry")
    assert len(steps) == 1
    assert said.startswith("I cannot audit celry. The package 'celry' is not installed here. Did you mean celery?")


@pytest.mark.parametrize(
    "prompt",
    [
        AUDIT_JOB.format(package="zope.interface"),
        "audit the package `zope.interface`.",
        "Please audit the installed package 'zope.interface', from 1 to 3.",
    ],
)
def test_the_prompt_may_name_the_package_in_several_ways(prompt: str) -> None:
    offered = [{"function": {"name": name}} for name in TOOLS]
    reply = scripts.demo(ModelCall({"messages": [{"role": "user", "content": prompt}], "tools": offered}, 1, {}))
    assert [each.arguments for each in reply if isinstance(each, ToolCall)] == [{"package": "zope.interface"}] * 2


@pytest.mark.parametrize("package", ["six", "ruff", "json", "httpx2"])
def test_a_package_of_any_kind_has_a_report(package: str) -> None:
    said, steps = talk(package)
    assert f"# Audit of {source.find(package).name}" in said
    assert f"{len(source.find(package).files)} module" in said
    assert all(len(step) > 1 for step in steps)
    assert "Traceback" not in said


def test_a_report_without_results_says_what_there_is() -> None:
    assert report.write("x", []).startswith("# Audit of x\n")


# --- the run and its verdict ----------------------------------------------------------------------------------------


def audited(answer: str) -> Run:
    """Return a run of the auditor that looked at two parts of httpx2 at once, and answered so."""
    run = auditor.start(AUDIT_JOB.format(package="httpx2"))
    steps: list[Any] = [
        [call("package_facts", package="httpx2"), call("list_modules", package="httpx2")],
        [call("undocumented", package="httpx2", module="httpx2._urls"), call("imports", package="httpx2")],
        answer,
    ]
    with scripted(*steps):
        return run_to_end(run)


def untrue(run: Run) -> list[str]:
    package = source.find("httpx2")
    return [claim.text for claim in judge_audit(run, package, 0, timedelta(seconds=1)).claims if not claim.true]


@pytest.mark.django_db
def test_an_audit_is_judged_by_its_rows_and_by_the_files() -> None:
    modules = len(source.find("httpx2").files)
    run = audited(f"It has {modules} modules.")
    assert untrue(run) == []
    # When a result is not what the files say, or the report has another number, it is seen
    looked = Row.objects.get(run_id=run.pk, name="undocumented")
    Row.objects.filter(pk=looked.pk).update(result={**(looked.result or {}), "public": 1})
    assert untrue(run) == ["read again, the files say the same", "the event log alone tells the same run"]
    assert untrue(audited("It has many modules.")) == ["the report says how many modules there are"]


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--package", "celry"], "The package 'celry' is not installed here. Did you mean celery?"),
        (["--package", "celry", "--job", "audit"], "Did you mean celery?"),
        (["--package", ""], "No package is named."),
        (["--package", "six", "--job", "main"], "--package is what the audit looks at"),
        (["--kill", "none", "--job", "audit"], "--kill is about the main job"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_server_is_started(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr("agents_project.embedded.ensure", started)
    monkeypatch.setattr("agents_project.demo.management.commands.demo.Supervisor", started)
    with pytest.raises(CommandError) as caught:
        call_command("demo", "--once", *arguments, stdout=io.StringIO(), stderr=io.StringIO())
    assert said in str(caught.value)
    assert caught.value.returncode == 2
