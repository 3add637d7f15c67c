"""How many times as many trials `make faults` makes of the tests marked `faults`."""

import os

FAULTS = int(os.environ.get("FAULTS", "1"))
EXIT_CODES = {0: "ended well", 2: "refused"}  # of a command line, as tally has them
