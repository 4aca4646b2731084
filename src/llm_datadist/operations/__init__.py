"""The operations of a CacheManager: their rules, and what they ask of the engine."""
