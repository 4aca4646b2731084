"""What ends the demo early."""

from __future__ import annotations


class DemoError(Exception):
    """The demo cannot go on. The message is for the terminal, and says what to do."""

    exit_code = 1


class SetupError(DemoError):
    """Something that the user can put right stands in the way: an option, a package, a port."""

    exit_code = 2
