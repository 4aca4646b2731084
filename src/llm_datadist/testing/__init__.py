"""Test support that ships with the package: real processes, real sockets, real memory."""
