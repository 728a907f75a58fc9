"""The mutants fit the code as it is, and the fast tests notice nearly all of them."""

import pytest

from tests.mutants.mutation import REPOSITORY, survivors
from tests.mutants.tables import MUTANTS

SHARE = 0.95


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_table_follows_the_code(mutant):
    source = mutant.source()
    assert mutant.old != mutant.new
    compile(source, mutant.file, "exec")
    assert all((REPOSITORY / "tests" / test).is_file() for test in mutant.tests)


def test_there_are_enough_mutants_of_everything():
    assert len(MUTANTS) >= 60
    assert len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)
    folders = [REPOSITORY / "visionpos" / place for place in ("input", "rotary", "bias", "conditional")]
    registered = [path for folder in folders for path in folder.glob("*.py") if "@register_" in path.read_text()]
    missing = {str(path.relative_to(REPOSITORY / "visionpos")) for path in registered} - {m.file for m in MUTANTS}
    assert missing <= {"conditional/lepe.py", "conditional/peg.py"}, "no formula of their own: conditional/depthwise.py"


@pytest.mark.slow
def test_mutants_are_killed():
    alive = survivors(MUTANTS)
    assert len(alive) <= (1 - SHARE) * len(MUTANTS), "survivors:\n" + "\n".join(map(str, alive))
