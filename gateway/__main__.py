"""Run the gateway: `python -m gateway`."""

from fedota.kernel.service import main
from gateway.app import create_app
from gateway.settings import Settings

if __name__ == "__main__":
    main("gateway", Settings, create_app)
