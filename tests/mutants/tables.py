"""All mutants."""

from tests.mutants.bias import BIAS
from tests.mutants.rotary import ROTARY
from tests.mutants.shared import SHARED
from tests.mutants.tokens import TOKENS

MUTANTS = [*SHARED, *ROTARY, *BIAS, *TOKENS]
