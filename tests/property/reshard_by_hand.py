"""As many random cases as one likes: `python tests/property/reshard_by_hand.py 100000 [SEED]`."""

from __future__ import annotations

import sys
from random import Random

from layout_cases import Case


def main(count: int, seed: int = 0) -> None:
    """A failure names the seed of its case, with which it alone can be run again (count 1)."""
    num_refused = 0
    for number in range(seed, seed + count):
        case = Case.random(Random(number))
        try:
            case.check()
            case.check_pushes()
        except BaseException:
            sys.stderr.write(f"the case with the seed {number} fails\n")
            raise
        num_refused += not case.is_covered()
    sys.stdout.write(f"{count} cases, {num_refused} of them rightly refused: 0 bytes wrong\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
