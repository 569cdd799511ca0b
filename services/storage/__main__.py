"""Run storage: `python -m services.storage`."""

from fedota.kernel.service import main
from services.storage.app import create_app
from services.storage.settings import Settings

if __name__ == "__main__":
    main("storage", Settings, create_app)
