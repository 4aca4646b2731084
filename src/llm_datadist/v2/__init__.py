"""The import paths of the reference. Spec 2.2."""
