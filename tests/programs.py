"""The programs that tests want and that no Python environment brings: where they are, and the marks of the tests that need them.

A test says `@pytest.mark.needs_curl`; where curl is not there it is skipped, with the reason (tests/conftest.py). `.ci/run`
installs all of them, and takes a skip for a failure.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agents_project import rabbitmq

CHROMIUM = Path("/usr/bin/chromium")
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True)
class Need:
    """`what` ends the sentence "needs ..."."""

    what: str
    is_there: Callable[[], bool]


def _programs(*names: str) -> Callable[[], bool]:
    return lambda: all(shutil.which(name) is not None for name in names)


NEEDS: dict[str, Need] = {
    "needs_chromium": Need("a browser, Debian's chromium", CHROMIUM.exists),
    "needs_rabbitmq": Need("a broker, Debian's rabbitmq-server", rabbitmq.installed),
    "needs_pgbouncer": Need("a pooler, Debian's pgbouncer", lambda: PGBOUNCER is not None),
    "needs_node": Need("a JavaScript runtime, Debian's nodejs and npm", _programs("node", "npm")),
    "needs_curl": Need("a command line client, Debian's curl", _programs("curl")),
    "needs_openssl": Need("what makes certificates, Debian's openssl", _programs("openssl")),
    "needs_systemd": Need("what reads units, Debian's systemd", _programs("systemd-analyze")),
    "needs_linux": Need("Linux, which kills children with their parent", lambda: sys.platform == "linux"),
}
