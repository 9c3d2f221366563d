#!/usr/bin/env python
"""Django's commands for this project, on embedded servers when the environment names none."""

import os
import sys

# Commands that touch neither database nor broker, or bring them up themselves; with --help none does.
WITHOUT_SERVERS = {"demo", "help", "version", "check", "makemigrations", "diffsettings", "findstatic", "collectstatic"}


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "agents_project.settings")
    command = sys.argv[1] if len(sys.argv) > 1 else "help"
    if command not in WITHOUT_SERVERS and not command.startswith("-") and not {"--help", "-h"} & set(sys.argv):
        from agents_project import embedded

        try:
            embedded.ensure()
        except embedded.EmbeddedError as error:
            sys.exit(str(error))
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
