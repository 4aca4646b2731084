"""The verb `bench`: how fast caches move here, beside what the machine and others can do."""
