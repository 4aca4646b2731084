"""`llm_datadist.hixl`, under the name of the reference's package."""

from llm_datadist.hixl import *  # noqa: F403
from llm_datadist.hixl import __all__ as __all__
