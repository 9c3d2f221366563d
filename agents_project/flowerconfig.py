"""Flower's configuration: `celery -A agents_project flower --conf=agents_project/flowerconfig.py`.

    FLOWER_BASIC_AUTH         user:password; Flower does not start without it, for it can end workers
    LONGHAUL_ADMIN_URL        where people open the admin; a task's page links to its run or call there
    LONGHAUL_CELERY_EVENTS    1: Flower asks the workers for their events; else it shows workers and queues only

Flower runs this file and takes the names that are options of its own.
"""

import os
import sys

from flower.options import options  # type: ignore[import-untyped]
from flower.urls import settings  # type: ignore[import-untyped]

from agents_project import embedded, flower_pages

if not (options.basic_auth or options.auth):
    sys.exit("Flower can end workers, so it wants to know who asks: set FLOWER_BASIC_AUTH=user:password.")

embedded.ensure()
flower_pages.extend(settings, os.environ.get("LONGHAUL_ADMIN_URL", ""))

tasks_columns = "name,args,state,received,runtime,worker,uuid"
# Else Flower would turn on, every few seconds, what the settings have turned off.
enable_events = os.environ.get("LONGHAUL_CELERY_EVENTS") == "1"
