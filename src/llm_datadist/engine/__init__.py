"""The engine: one per LLMDataDist; it links to peers, serves them and moves bytes."""
