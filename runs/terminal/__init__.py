"""A run in a terminal.

words    how texts, times and names are written: harmless, in one line
canvas   lines that fit, and the marks that the terminal knows
view     RunView: what was seen of a run, from its events alone
reader   reading events where the database goes away in between
screen   the console: drawn on, or told plain lines; NO_COLOR and broken pipes
naming   which run is meant by the part of an id
"""

from runs.terminal.canvas import WIDTH, Canvas
from runs.terminal.naming import run_named
from runs.terminal.reader import PATIENCE, SaysItself, database_clock, database_there, patient
from runs.terminal.screen import (
    BROKEN_PIPE,
    console_on,
    drawing,
    draws,
    follow,
    leave_broken_pipe,
    tell,
    unechoed,
    unread_is_no_error,
)
from runs.terminal.view import CallSeen, LegSeen, Note, RunView
from runs.terminal.words import ENDS, harmless, one_line, place, seconds, short

__all__ = [
    "BROKEN_PIPE",
    "ENDS",
    "PATIENCE",
    "WIDTH",
    "CallSeen",
    "Canvas",
    "LegSeen",
    "Note",
    "RunView",
    "SaysItself",
    "console_on",
    "database_clock",
    "database_there",
    "drawing",
    "draws",
    "follow",
    "harmless",
    "leave_broken_pipe",
    "one_line",
    "patient",
    "place",
    "run_named",
    "seconds",
    "short",
    "tell",
    "unechoed",
    "unread_is_no_error",
]
