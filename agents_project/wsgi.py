"""The WSGI application, for hosts that have no ASGI server."""

import os

from agents_project import embedded

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "agents_project.settings")
os.environ.setdefault("LONGHAUL_DB_POOL", "1")
embedded.ensure()

from django.core.wsgi import get_wsgi_application  # noqa: E402

application = get_wsgi_application()
