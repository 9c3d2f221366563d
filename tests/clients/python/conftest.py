"""The client of a user of the tests' server."""

from __future__ import annotations

from tests.http.conftest import api as api
from tests.http.conftest import api_of as api_of
from tests.http.conftest import coroutines_connections_end as coroutines_connections_end
from tests.http.conftest import ended as ended
from tests.http.conftest import helper as helper
from tests.http.conftest import live as live
from tests.http.web import web as web
from tests.streams.test_cuts import seed as seed
from tests.streams.test_cuts import world as world
