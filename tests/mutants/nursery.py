"""A process that has imported what takes long, and forks a pytest for each request: a second instead of four.

Run by the workshop in the private copy. It has imported nothing of ours, so each fork imports the code as it is then.

    in:  {"arguments": [...], "output": "a file"}      a line of JSON on stdin
    out: {"pid": ...}, then {"code": ...}              lines of JSON on stdout
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from typing import Any

SLOW_IMPORTS = (
    "pytest", "django.db.models", "django.test", "django.contrib.auth", "django.core.management", "psycopg", "psycopg_pool",
    "celery", "celery.app.task", "kombu.transport.redis", "redis", "gevent", "openai", "openai.types", "pydantic", "orjson",
    "rich.console", "griffelib", "asgiref.sync",
)  # fmt: skip


def child(request: dict[str, Any]) -> int:
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for new, old in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(new, old)
    sys.path.insert(0, os.getcwd())  # as `python -m pytest` does: before where the project is installed
    sys.argv = ["pytest", *request["arguments"]]
    import pytest

    return int(pytest.main(request["arguments"]))


def main() -> None:
    for name in SLOW_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not {"runs", "tools", "threads", "agents_project", "tests"} & set(sys.modules)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            code = 70
            try:
                code = child(request)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
