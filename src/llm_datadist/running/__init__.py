"""How work waits and ends: deadlines, threads, movers, the gate, the loop, and the end of all."""
