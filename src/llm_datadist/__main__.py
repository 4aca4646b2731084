"""`python -m llm_datadist` is `llm-datadist`."""

from llm_datadist.cli import app

# the demo's workers import this module again
if __name__ == "__main__":
    app(prog_name="llm-datadist")
