"""Asking a peer: finding its caches, reading them, having it fetch ours. For any thread."""
