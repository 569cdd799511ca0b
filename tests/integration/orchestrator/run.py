"""The orchestrator as a process of its own, launching stand-ins: `python -m tests.integration.orchestrator.run`."""

from functools import partial
from typing import Final

from fedota.kernel.service import main
from services.orchestrator.app import create_app
from services.orchestrator.launchers.component import Pace
from services.orchestrator.launchers.namespace import Modules
from services.orchestrator.settings import Settings

STAND_IN: Final = "tests.integration.orchestrator.stand_in"
STAND_INS: Final = Modules(coordinator=STAND_IN, selector=STAND_IN)
PACE: Final = Pace(first_delay=0.05, longest_delay=0.5, ready=6.0, look=0.2, grace=3.0, deaths=3)
create: Final = partial(create_app, modules=STAND_INS, pace=PACE)

if __name__ == "__main__":
    main("orchestrator", Settings, create)
