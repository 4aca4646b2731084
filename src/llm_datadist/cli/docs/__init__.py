"""The documentation, as it is in the package."""
