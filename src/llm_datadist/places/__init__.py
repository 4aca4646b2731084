"""A process with several devices: a place for each, and what acts on all of them. Seed 002, D30."""
