"""The processes that somebody started here, found from outside: by their purpose, in this checkout."""

from __future__ import annotations

import os
from pathlib import Path

from agents_project import embedded
from agents_project.processes import Identity, running


def of_purpose(purpose: str) -> list[Identity]:
    """Return what runs with this LONGHAUL_PURPOSE, whoever started it, but for this process itself.

    A purpose is a checkout's own: a session of another one may have the same, and is told apart by its working folder.
    """
    wanted = f"LONGHAUL_PURPOSE={purpose}".encode()
    found = []
    for each in running():
        process = Path(f"/proc/{each.pid}")
        try:
            # Postgres works in its data folder, which is another one in each checkout.
            folder = process.joinpath("cwd").readlink()
            variables = process.joinpath("environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended just now, or is another user's
        here = folder == embedded.PROJECT or folder.is_relative_to(embedded.data_folder(purpose))
        if here and wanted in variables and each.pid != os.getpid():
            found.append(each)
    return found
