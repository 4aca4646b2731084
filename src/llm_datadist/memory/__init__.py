"""Memory: what lies where in this process."""
