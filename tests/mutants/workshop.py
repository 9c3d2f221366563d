"""Break a private copy of the project, and see which tests fail there.

One Postgres and one Valkey serve all mutants. The copy's database is migrated once; each mutant gets a copy of that (Postgres
makes it from a template in a tenth of a second) with its own SQL functions put in, and a pytest process of its own (`nursery.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import redis
from psycopg import sql

from agents_project import embedded
from tests.mutants.mutant import Mutant, Stale

PROJECT = Path(__file__).resolve().parents[2]
LEFT_OUT = (".venv", ".git", ".*_cache", ".hypothesis", "__pycache__", "staticfiles", "*.egg-info")
CLEAN = "longhaul_mutants_clean"
TEST_SECONDS = 30  # one test; a mutant may wait for what never comes
PATIENCE_SECONDS = 240  # all tests of one mutant


class WorkshopError(Exception):
    """The unchanged code does not pass, or the copy is not what is tested: no verdict would mean anything."""


@dataclass
class Verdict:
    """killed: every named test failed. survived: one did not. broken: the code does not run. stale: it does not apply."""

    mutant: str
    verdict: str
    seconds: float
    why: list[str] = field(default_factory=list)
    output: str = ""


class Workshop:
    """A context manager: the private copy, its servers and its database."""

    def __enter__(self) -> Workshop:
        self._folder = tempfile.TemporaryDirectory(prefix="longhaul-mutants-")
        self.copy = Path(self._folder.name).resolve() / "project"
        self._report = self.copy.parent / "report.json"
        self._output = self.copy.parent / "output"
        self._child = 0  # the session of the pytest that runs
        shutil.copytree(PROJECT, self.copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        if (PROJECT / ".venv").exists():
            (self.copy / ".venv").symlink_to(PROJECT / ".venv")
        self._ours = not (os.environ.get("DATABASE_URL") or os.environ.get("REDIS_URL"))
        if not (os.environ.get("DATABASE_URL") and os.environ.get("REDIS_URL")):
            os.environ["LONGHAUL_PURPOSE"] = embedded.reserve(os.environ.get("LONGHAUL_PURPOSE") or "mutants")
        self.servers = embedded.ensure(durable=False)
        self._url = os.environ["DATABASE_URL"]
        self._test_database = "test_" + urlsplit(self._url).path.lstrip("/")
        self._migrate()
        self._nursery = subprocess.Popen(  # its answers are one line each, and each is waited for
            [sys.executable, "-P", "tests/mutants/nursery.py"],
            cwd=self.copy, env=self._environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_child()
        self._nursery.kill()
        self._nursery.wait()
        with psycopg.connect(self._url, autocommit=True) as to:
            self._drop(to, self._test_database)
            self._drop(to, CLEAN)
        self._folder.cleanup()

    # -- the database --

    def _url_of(self, database: str) -> str:
        parts = urlsplit(self._url)
        return urlunsplit(parts._replace(path=f"/{database}"))

    def _drop(self, to: psycopg.Connection[Any], database: str) -> None:
        to.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(database)))

    def _migrate(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as to:
            self._drop(to, CLEAN)
            to.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(CLEAN)))
        done = subprocess.run(
            [sys.executable, "manage.py", "migrate", "--verbosity", "0"],
            cwd=self.copy, env=self._environment() | {"DATABASE_URL": self._url_of(CLEAN)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise WorkshopError(f"The copy cannot be migrated:\n{done.stdout}{done.stderr}")

    def _fresh_database(self, functions: Iterable[str]) -> None:
        with psycopg.connect(self._url, autocommit=True) as to:
            self._drop(to, self._test_database)
            to.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                    sql.Identifier(self._test_database), sql.Identifier(CLEAN)
                )
            )
        with psycopg.connect(self._url_of(self._test_database), autocommit=True) as to:
            for text in functions:
                to.execute(text.encode())

    # -- the tests --

    def _end_child(self) -> None:
        child, self._child = self._child, 0
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(json.dumps(request) + "\n")

    def _answer(self) -> dict[str, Any]:
        assert self._nursery.stdout is not None
        line = self._nursery.stdout.readline()
        if not line:
            raise WorkshopError("The process that runs the tests has died.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _environment(self) -> dict[str, str]:
        # No bytecode of a mutant may be kept: the next one can have the same size in the same second.
        return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CI")} | {
            "PYTHONDONTWRITEBYTECODE": "1",
            "MUTANT_REPORT": str(self._report),
        }

    def _pytest(self, tests: Sequence[str], *options: str, patience: float = PATIENCE_SECONDS) -> tuple[Any, str]:
        """Run the tests in the copy. Returns the plugin's report (None: it never came) and what pytest printed."""
        self._report.unlink(missing_ok=True)
        if self._ours:  # what a mutant's tests left there; a server that somebody named may hold more than that
            redis.Redis.from_url(os.environ["REDIS_URL"]).flushall()
        arguments = [
            "-p", "tests.mutants.verdict", "-p", "no:cacheprovider", "-q", "--tb=short", f"--timeout={TEST_SECONDS}",
            "-W", "ignore::pytest.PytestAssertRewriteWarning",  # the nursery has imported a plugin or two
            *options, *tests,
        ]  # fmt: skip
        self._ask({"arguments": arguments, "output": str(self._output)})
        pid = self._child = self._answer()["pid"]
        assert self._nursery.stdout is not None
        ended = select.select([self._nursery.stdout], [], [], patience)[0]
        if not ended:
            os.killpg(pid, signal.SIGKILL)
        self._answer()
        self._end_child()  # and what a test has started and a broken one has not ended
        output = self._output.read_text(errors="replace")
        if not self._report.exists():
            return None, output
        report = json.loads(self._report.read_text())
        if report["foreign"]:
            raise WorkshopError(f"The tests did not import the copy: {report['foreign'][:3]}")
        return report, output

    def check_unchanged(self, mutants: Sequence[Mutant]) -> None:
        """Every named test passes on the unchanged code. Raises WorkshopError."""
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        self._fresh_database([])
        report, output = self._pytest(tests, "--reuse-db", patience=1800)
        if report is None or report["failures"] or report["uncollected"]:
            raise WorkshopError(f"The unchanged code does not pass:\n{output}")
        if missing := [test for test in tests if not _cases(report["ran"], test)]:
            raise WorkshopError(f"There are no such tests: {', '.join(missing)}\n{output}")

    def judge(self, mutant: Mutant) -> Verdict:
        began = time.monotonic()
        try:
            texts = mutant.texts(self.copy)
        except Stale as stale:
            return Verdict(mutant.name, "stale", 0.0, [str(stale)])
        places = {self.copy / file: text for file, text in texts.items()}
        before = {place: (place.read_text(), place.stat()) for place in places}
        try:
            for place, text in places.items():
                place.write_text(text)
            verdict, why, output = self._judge(mutant, texts)
        finally:
            for place, (text, stat) in before.items():
                place.write_text(text)
                os.utime(place, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return Verdict(mutant.name, verdict, round(time.monotonic() - began, 1), why, output)

    def _judge(self, mutant: Mutant, texts: dict[str, str]) -> tuple[str, list[str], str]:
        migrates = any("/migrations/" in file for file in texts)
        try:
            self._fresh_database(text for file, text in texts.items() if file.endswith(".sql"))
        except psycopg.Error as error:
            return "broken", [f"its SQL is refused: {error}"], ""
        report, output = self._pytest(mutant.tests, "--create-db" if migrates else "--reuse-db")
        if report is None:
            return "broken", ["pytest did not end in order"], output
        if report["uncollected"]:
            return "broken", report["uncollected"], output
        why, verdict = [], "killed"
        for test in mutant.tests:
            failures = [failure for failure in report["failures"] if _cases([failure["test"]], test)]
            real = [failure for failure in failures if failure["kind"] == "failed"]
            if real:
                why.append(f"{test}: {real[0]['error']}")
                continue
            why.append(f"{test}: {failures[0]['error'] if failures else 'passed'}")
            if verdict != "broken":
                verdict = "broken" if failures else "survived"
        return verdict, why, output


def _cases(ran: Iterable[str], test: str) -> list[str]:
    return [each for each in ran if each == test or each.startswith(f"{test}[")]
