"""The shop goes on as it was, and has an agent."""

from __future__ import annotations

import pytest

from tests.host.conftest import CONFIGURATION
from tests.host.host import Host

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_what_the_shop_says_of_its_own_tasks_counts_for_them_as_before(adopted: Host) -> None:
    now = adopted.python(CONFIGURATION)
    assert now == adopted.before
