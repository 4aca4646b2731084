"""The pure core: arithmetic, tables and protocols; no sockets, threads, clocks, native calls."""
