"""What the calls of a cluster ask for, carried out: pulls, pushes, copies, layers."""
