"""Answering peers: our caches, who may reach them, and the streams on which peers ask."""
