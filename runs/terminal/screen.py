"""The terminal itself: a console that is drawn on, or told plain lines, and that may go away."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, NoReturn

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment

from runs.terminal.reader import SaysItself
from runs.terminal.view import RunView
from runs.terminal.words import harmless, short

BROKEN_PIPE = 141  # the status of a program that SIGPIPE ended, as shells tell it


class _Console(Console):
    def on_broken_pipe(self) -> None:
        leave_broken_pipe(self.file)


def console_on(stream: IO[str]) -> Console:
    """Return a console that writes to `stream`; what the stream's encoding does not know becomes `?`."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    return _Console(file=stream, highlight=False, markup=False, emoji=False)


def leave_broken_pipe(stream: IO[str]) -> NoReturn:
    """End without a word, for whoever read the stream has left (`| head`). Raises SystemExit, as if by SIGPIPE."""
    with suppress(OSError, ValueError, AttributeError):
        # What is still in the stream's buffer would fail again when Python flushes it at the end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    raise SystemExit(BROKEN_PIPE)


@contextmanager
def unread_is_no_error(stream: IO[str]) -> Iterator[None]:
    """Write to `stream` in the body, to its end: where its reader has left (`| head`), end as SIGPIPE would, without a word."""
    try:
        yield
        stream.flush()
    except BrokenPipeError:
        leave_broken_pipe(stream)


def draws(console: Console) -> bool:
    """Say whether the console is one to draw on, rather than to be told plain lines. NO_COLOR only takes the colours."""
    return console.is_terminal and not console.is_dumb_terminal


def tell(console: Console, lines: Iterable[str]) -> None:
    """Print plain lines, at once and unchanged, however long."""
    for line in lines:
        console.print(line, soft_wrap=True, style=None)


@contextmanager
def unechoed() -> Iterator[None]:
    """Keep what is typed off the screen: an echoed ^C or Enter moves the lines under a drawing, which doubles its head.

    Keys still act as ever. Nothing happens where stdin is no terminal, or another process has it in the foreground.
    """
    try:
        import termios  # not everywhere
    except ImportError:
        yield
        return
    try:
        terminal = sys.stdin.fileno()
        if os.tcgetpgrp(terminal) != os.getpgrp():  # to set it from the background would stop us
            raise OSError
        before = termios.tcgetattr(terminal)
    except (OSError, ValueError, AttributeError, termios.error):
        yield
        return
    silent = before.copy()
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        with suppress(OSError, termios.error):
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)


class _AtOnce(RenderHook):
    """Has a terminal show each picture when it is whole, where it knows how (DEC mode 2026); others take no notice."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        begin, end = Control(), Control()
        # Only a segment with codes counts as one without width; which ones, nobody asks outside of old Windows.
        codes = [(ControlType.HOME,)]
        begin.segment, end.segment = Segment("\x1b[?2026h", None, codes), Segment("\x1b[?2026l", None, codes)
        return [begin, *renderables, end]


@contextmanager
def drawing(view: RunView, console: Console) -> Iterator[None]:
    """Draw the view again and again while the body runs; its last picture stays."""
    with unechoed(), Live(view, console=console, refresh_per_second=10):
        console.push_render_hook(_AtOnce())
        try:
            yield
        finally:
            console.pop_render_hook()


def follow(events: Iterable[SaysItself], view: RunView, console: Console) -> None:
    """Show the run until its events end. Raises what the iterator raises; KeyboardInterrupt leaves the last picture."""
    if not draws(console):
        for event in events:
            tell(console, view.apply(event.as_dict()))
        return
    last: list[str] = []
    with drawing(view, console):
        for event in events:
            last = view.apply(event.as_dict()) or last
    if view.finished:  # the picture shows only the end of a long answer
        said = (
            view.output if isinstance(view.output, str) else "" if view.output is None else short(view.output, 10_000)
        )
        tell(console, [*harmless(said).splitlines(), *last[-1:]])
