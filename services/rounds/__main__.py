"""Run the rounds service: `python -m services.rounds`."""

from fedota.kernel.service import main
from services.rounds.app import create_app
from services.rounds.settings import Settings

if __name__ == "__main__":
    main("rounds", Settings, create_app)
