"""What several parts need."""

from __future__ import annotations

import pytest

from certificates import Authority


@pytest.fixture(scope="module")
def security(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A `link_security` by TLS."""
    return Authority().issue(tmp_path_factory.mktemp("authority")).option()
