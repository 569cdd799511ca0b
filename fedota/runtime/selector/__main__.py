"""`python -m fedota.runtime.selector`, in a directory that holds its `settings.json`."""

from fedota.contracts.runtime import SelectorSettings
from fedota.runtime.launch import launch
from fedota.runtime.selector.app import SERVER, create_app

if __name__ == "__main__":
    launch("selector", SelectorSettings, create_app, **SERVER)
