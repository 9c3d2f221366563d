"""`manage.py replay_run RUN`: play a run again, show what the model was sent in a step, compare the log with the tables."""

from __future__ import annotations

import json as json_module
import math
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable
from typing import Any

from django.core.management import BaseCommand, CommandError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from runs import verification
from runs.exceptions import LonghaulError
from runs.models import Run
from runs.providers.port import ProviderError, UnknownProvider
from runs.step_request import StepRequest, step_request
from runs.terminal import (
    RunView,
    console_on,
    database_there,
    draws,
    follow,
    harmless,
    patient,
    run_named,
    tell,
    unread_is_no_error,
)
from runs.terminal.player import Player
from runs.verification import Report

SHOWN = 100  # runs with differences that --all tells; all are counted


class Command(BaseCommand):
    help = (
        "Plays a run in the terminal as it streamed. --at-step shows what the model was sent; --verify rebuilds the run"
        " from its event log alone and compares it with the tables, exit 1 on any difference."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("run", nargs="?", help="the run's id, or a part of it that no other run has")
        parser.add_argument(
            "--speed",
            type=_speed,
            metavar="N",
            help="1: as fast as it was (the default), 10: ten times as fast, 0: at once (the default of --json)",
        )
        parser.add_argument("--at-step", type=int, metavar="N", help="show what the model was sent in this step")
        parser.add_argument("--verify", action="store_true", help="compare what the log tells with the tables")
        parser.add_argument("--all", action="store_true", help="with --verify and without RUN: every run there is")
        parser.add_argument(
            "--json",
            action="store_true",
            help='one JSON line an event; with --at-step the very body of the request; with --verify {"run",'
            ' "differences", "events", "since"}, with --all {"runs", "events", "differences", "found"}, and "removed" where a log was',
        )

    def handle(
        self,
        *,
        run: str | None,
        speed: float | None,
        at_step: int | None,
        verify: bool,
        all: bool,
        json: bool,
        **_: Any,
    ) -> None:
        if at_step is not None and verify:
            raise CommandError("--at-step shows one step, --verify compares the run: give one of them.")
        if speed is not None and (verify or at_step is not None):
            raise CommandError("--speed is for playing: leave it out with --at-step and --verify.")
        if all and not verify:
            raise CommandError("--all goes with --verify.")
        if all != (run is None):
            raise CommandError("Give a run, or --verify --all for every run.")
        stream: Any = getattr(self.stdout, "_out", self.stdout)  # without Django's newline after each write
        try:
            with database_there(), unread_is_no_error(stream):
                if run is None:
                    self._verify_all(stream, json)
                    return
                found = run_named(run)
                if verify:
                    self._verify(stream, found, json)
                elif at_step is not None:
                    self._show_step(stream, found, at_step, json)
                else:
                    self._play(stream, found, (0.0 if json else 1.0) if speed is None else speed, json)
        except KeyboardInterrupt:
            sys.exit(130)

    # --- playing ----------------------------------------------------------------------------------------------------

    def _play(self, stream: Any, run: Run, speed: float, json: bool) -> None:
        console = console_on(stream)
        view = RunView(run.pk, agent=run.agent, since=run.created_at)

        def told(lines: list[str]) -> None:
            if json:
                for line in lines:
                    self.stderr.write(line.strip())
            elif not draws(console):
                tell(console, lines)

        # A run that is live goes on as it comes, when what has been is told.
        events = patient(lambda seen: run.events(after=seen, follow=not run.finished), view, told)
        player = Player(events, speed, lambda said: told(view.note(said, "dim")))
        if speed:
            view.clock = player.clock
        if not json:
            follow(player, view, console)
            return
        for event in player:
            flat = event.as_dict()
            view.apply(flat)
            stream.write(json_module.dumps(flat, ensure_ascii=False, default=str) + "\n")
            stream.flush()

    # --- a step -----------------------------------------------------------------------------------------------------

    def _show_step(self, stream: Any, run: Run, number: int, json: bool) -> None:
        try:
            sent = step_request(run, number)
        except (LonghaulError, ProviderError, UnknownProvider) as error:
            raise CommandError(str(error)) from error
        for doubt in sent.doubts:
            self.stderr.write(f"This is not exactly what was sent: {doubt}.")
        if json:
            _write(stream, sent.body + b"\n")
        else:
            tell(console_on(stream), _lines(sent))
        if sent.doubts:
            sys.exit(1)

    # --- the comparison ---------------------------------------------------------------------------------------------

    def _verify(self, stream: Any, run: Run, json: bool) -> None:
        report = verification.verify(run)
        if json:
            stream.write(json_module.dumps(report.as_dict(), default=str) + "\n")
        else:
            stream.writelines(f"{harmless(line)}\n" for line in _told(report))
        stream.flush()
        if report.differences:
            sys.exit(1)

    def _verify_all(self, stream: Any, json: bool) -> None:
        runs = events = removed = differences = 0
        found: list[Report] = []
        for report in self._with_a_bar(verification.verify_all(), Run.objects.count()):
            runs, events = runs + 1, events + report.events
            removed += bool(report.removed)
            differences += len(report.differences)
            if report.differences and len(found) < SHOWN:
                found.append(report)
        if json:
            said = {"runs": runs, "events": events, "differences": differences}
            if removed:
                said["removed"] = removed
            said |= {"found": [report.as_dict() for report in found]}  # type: ignore[dict-item]
            stream.write(json_module.dumps(said, default=str) + "\n")
        else:
            for report in found:
                stream.writelines(f"{harmless(line)}\n" for line in _told(report))
            if removed:
                stream.write(f"Of {_number(removed, 'run')} the log was removed: only the end is compared.\n")
            stream.write(
                f"{_number(runs, 'run')}, {_number(events, 'event')}: {_number(differences, 'difference')} between the"
                " log and the tables.\n"
            )
        stream.flush()
        if differences:
            sys.exit(1)

    def _with_a_bar(self, reports: Iterable[Report], total: int) -> Iterable[Report]:
        stream: Any = getattr(self.stderr, "_out", self.stderr)
        console = console_on(stream)
        if not draws(console):
            yield from reports
            return
        columns = (TextColumn("runs compared"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(reports, total=total)


def _speed(text: str) -> float:
    speed = float(text)
    if not math.isfinite(speed) or speed < 0:
        raise ArgumentTypeError("give 0 (at once), 1 (as it was), 10 (ten times as fast), ...")
    return speed


def _write(stream: Any, data: bytes) -> None:
    """Write bytes as they are, whatever the encoding of the stream; into a text of a test as UTF-8."""
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        stream.write(data.decode())
    else:
        stream.flush()
        buffer.write(data)
    stream.flush()


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _told(report: Report) -> Iterable[str]:
    found = _number(len(report.differences), "difference") if report.differences else "no difference"
    if report.removed:
        yield (
            f"Run {report.run}: events 1 to {report.removed:,} were removed, so only what the last one tells is compared."
        )
    yield f"Run {report.run}: {_number(report.events, 'event')}, {found} between the log and the tables."
    yield from (f"  {each}" for each in report.differences)
    yield from (f"  since then: {each}" for each in report.since)


def _lines(sent: StepRequest) -> Iterable[str]:
    step = sent.step
    yield f"Step {step.number} of run {sent.run.pk}: what the model was sent ({len(sent.body):,} bytes)"
    yield f"model         {harmless(sent.model)}"
    yield f"tool_choice   {harmless(sent.tool_choice)}"
    yield f"options       {_json(sent.options)}"
    yield f"instructions  {'' if sent.instructions else '(none)'}".rstrip()
    yield from _indented(sent.instructions)
    same = "as in code today" if step.schema_digest == sent.schema_digest else "today's code has another one"
    yield f"tools         {len(step.tool_names)}, digest {step.schema_digest} ({same})"
    for tool in sent.tools:
        yield f"  {tool.name}: {' '.join(harmless(tool.description).split())}"
        yield f"    {_json(tool.parameters)}"
    yield from (f"  {harmless(name)}: no longer in code" for name in sent.gone)
    yield f"messages      {len(sent.messages)}"
    for message in sent.messages:
        yield f"  {message['role']} (place {message['position']}, {message['id']})"
        for part in message["content"]:
            match part.get("type"):
                case "text":
                    yield from _indented(part["text"])
                case "reasoning":
                    yield "    (reasoning, which is not shown again)"
                case "tool_call":
                    yield f"    calls {harmless(part['name'])}({_json(part.get('arguments'))})"
                case "tool_result":
                    said = part.get("result") if part.get("outcome") == "success" else part.get("error")
                    yield f"    {harmless(str(part.get('name', 'tool')))} {part.get('outcome')}: {_json(said)}"
                case _:
                    yield f"    {_json(part)}"


def _indented(text: str) -> Iterable[str]:
    return (f"    {line}" for line in harmless(text).splitlines())


def _json(value: Any) -> str:
    return harmless(json_module.dumps(value, ensure_ascii=False, default=str)).replace("\n", " ")
