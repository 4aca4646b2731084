"""What runs in the machine: tests by part, which nothing else collects."""
