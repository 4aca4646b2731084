"""The pure core: arithmetic, tables and protocols without sockets, threads, clocks or native calls."""
