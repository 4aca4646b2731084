"""Other libraries' models and engines on top of llm_datadist. Each needs an extra of its own."""
