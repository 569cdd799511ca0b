"""Run the problems service: `python -m services.problems`."""

from fedota.kernel.service import main
from services.problems.app import create_app
from services.problems.settings import Settings

if __name__ == "__main__":
    main("problems", Settings, create_app)
