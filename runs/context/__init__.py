"""What the model is shown. `window` keeps the last messages of a thread, rendered once, from step to step."""

from runs.context.window import Window

__all__ = ["Window"]
