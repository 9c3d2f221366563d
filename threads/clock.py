"""Time is the database's: `longhaul_now()` in SQL, `Now()` in the ORM. A worker's own clock decides nothing."""

from datetime import datetime

from django.db import connection, models


class Now(models.Func):
    """`longhaul_now()`: `clock_timestamp()` plus the offset that only the test plugin writes."""

    function = "longhaul_now"
    output_field = models.DateTimeField()
    arity = 0


def now() -> datetime:
    """The database's time, read at once (one round trip)."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT longhaul_now()")
        row = cursor.fetchone()
    assert row is not None
    moment: datetime = row[0]
    return moment
