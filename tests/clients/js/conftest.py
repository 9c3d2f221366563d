"""Workers, clients of the API, and servers behind a proxy that cuts."""

from tests.http.conftest import api as api
from tests.http.conftest import api_of as api_of
from tests.http.conftest import coroutines_connections_end as coroutines_connections_end
from tests.workers.conftest import kit as kit
from tests.workers.conftest import workers as workers
