"""The ASGI application, for uvicorn: `uvicorn agents_project.asgi:application`."""

import gc
import os

from agents_project import embedded

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "agents_project.settings")
os.environ.setdefault("LONGHAUL_DB_POOL", "1")
embedded.ensure()

from django.core.asgi import get_asgi_application  # noqa: E402

django = get_asgi_application()

from django.urls import get_resolver  # noqa: E402

from agents_project import static_files  # noqa: E402
from runs import with_streams  # noqa: E402

application = static_files.before(with_streams(django))

# What is loaded now stays, views too. Python's collector need not look through it again, with all streams standing still
# meanwhile, and comes the sooner for what requests leave behind.
_ = get_resolver().url_patterns
gc.collect()
gc.freeze()
