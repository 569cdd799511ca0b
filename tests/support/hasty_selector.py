"""`python -m tests.support.hasty_selector`: a selector that gives a body half a second to go on, not twenty."""

import runpy
from typing import Final

from fedota.runtime import bodies

STALL: Final = 0.5  # seconds

if __name__ == "__main__":
    bodies.STALL = STALL  # type: ignore[misc]  # it is final everywhere but here
    runpy.run_module("fedota.runtime.selector", run_name="__main__")
