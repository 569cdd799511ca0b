"""Run the orchestrator: `python -m services.orchestrator`."""

from fedota.kernel.service import main
from services.orchestrator.app import create_app
from services.orchestrator.settings import Settings

if __name__ == "__main__":
    main("orchestrator", Settings, create_app)
