"""A worker that stands by: all is imported, nothing is begun. On SIGUSR1 it becomes the Celery worker of its arguments.

    python -m agents_project.demo.standby worker -P prefork -Q longhaul.tools ...

The demo has one tools worker and kills it, so the run can go on no sooner than its replacement works. Most of a start is
Python's imports, two seconds of CPU; a host with a second worker, or one that stands by, does not wait for them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

READY = "stands by"
# What Celery loads only when a worker begins.
PARTS = ("celery.bin.worker", "celery.concurrency.prefork", "celery.worker.consumer", "kombu.transport.redis")


def main(arguments: Sequence[str]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "agents_project.settings")

    import django

    from agents_project.celery import app

    django.setup()
    app.loader.import_default_modules()
    app.finalize()
    for module in PARTS:
        import_module(module)
    agents = import_module("runs.agents")
    agents.registry.discover()
    print(READY, flush=True)
    signal.sigwait({signal.SIGUSR1})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    app.worker_main(list(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
