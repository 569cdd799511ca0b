"""`python -m fedota.runtime.coordinator`, in a directory that holds its `settings.json`."""

from fedota.contracts.runtime import CoordinatorSettings
from fedota.runtime.coordinator.app import create_app
from fedota.runtime.launch import launch

if __name__ == "__main__":
    launch("coordinator", CoordinatorSettings, create_app)
