"""What can go wrong with a benchmark that the user should be told in one line."""

from __future__ import annotations


class BenchError(Exception):
    """A contestant failed: exit code 1."""

    exit_code = 1


class SetupError(BenchError):
    """Something is to be installed or asked for differently: exit code 2."""

    exit_code = 2
