"""What programs that a test starts need, beside their text."""

from __future__ import annotations

import os
import sys


def environment() -> dict[str, str]:
    """Of this process, with all that it can import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
