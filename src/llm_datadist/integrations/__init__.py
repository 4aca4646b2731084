"""Other libraries' models and engines on top of llm_datadist. None is imported unasked."""
