"""Python inside of the shop: one process of its own environment, that runs what it is given and tells what was printed.

Run by its path in the shop's environment, where nothing of this repository is to be found. JSON lines both ways.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback


def serve() -> None:
    import django

    django.setup()
    for line in sys.stdin:
        printed = io.StringIO()
        answer: dict[str, object] = {}
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(json.loads(line), "<test>", "exec"), {"__name__": "test"})
        except Exception:
            answer["error"] = traceback.format_exc()
        finally:
            from django.db import connections

            connections.close_all()
        print(json.dumps({**answer, "printed": printed.getvalue()}), flush=True)


if __name__ == "__main__":
    serve()
