"""`python -m fedota.runtime.selector`, in a directory that holds its `settings.json`."""

from fedota.contracts.runtime import SelectorSettings
from fedota.runtime.launch import launch
from fedota.runtime.selector.app import READ_BUFFER, create_app

if __name__ == "__main__":
    # A client that goes away must not be selected: its request ends with its connection.
    launch("selector", SelectorSettings, create_app, handler_cancellation=True, read_bufsize=READ_BUFFER)
