"""`python -m tests.mutants [WORD]`: run the mutants, or those with a word in their file or name; name survivors."""

import sys

from tests.mutants.mutation import survivors
from tests.mutants.tables import MUTANTS

if __name__ == "__main__":
    chosen = [mutant for mutant in MUTANTS if all(word in str(mutant) for word in sys.argv[1:])]
    if not chosen:
        sys.exit(f"no mutant has {' and '.join(map(repr, sys.argv[1:]))} in its file or name")
    alive = survivors(chosen, report=lambda line: print(line, flush=True))
    print(f"{len(chosen) - len(alive)} of {len(chosen)} killed")
