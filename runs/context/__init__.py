"""What the model is shown. `window` keeps the last messages of a thread, rendered once, from step to step."""

from runs.context.hidden import Hidden, mark, work_of
from runs.context.window import Window

__all__ = ["Hidden", "Window", "mark", "work_of"]
