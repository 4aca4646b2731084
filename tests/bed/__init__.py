"""A real kernel in a virtual machine, for what this machine's own kernel lacks: `make bed`."""

from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
#: in the machine: what it leaves behind, and what it is to do
SHARED: Final = Path("/mnt")
