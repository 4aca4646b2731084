"""How things end: calls that are interrupted, clusters that end under them, forks, finalizers."""
