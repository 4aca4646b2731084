"""Randomised cases that run for seconds under pytest, and for hours by `python -m soak`."""
