"""Run the platform until SIGTERM or SIGINT: `python -m fedota.local DATA_DIRECTORY`."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import structlog

from fedota.kernel.service import configure_logging
from fedota.kernel.settings import load
from fedota.local.background import Progress, forget_progress, write_progress
from fedota.local.external import External
from fedota.local.platform import running
from fedota.local.state import LocalError

_log = structlog.get_logger(__name__)


async def supervise(path: Path) -> None:
    """Keep the platform alive, and say how far it is."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    progress = Progress(pid=os.getpid())

    def tell(name: str) -> None:
        progress.up.append(name)
        write_progress(path, progress)

    write_progress(path, progress)
    async with running(path, load(External), tell) as platform:
        progress.gateway_url = platform.gateway_url
        write_progress(path, progress)
        _log.info("ready", url=platform.gateway_url)
        await asyncio.Event().wait()


def main() -> None:
    """The supervisor's life; exits with 1 when the platform cannot start."""
    path = Path(sys.argv[1])
    configure_logging("platform", "info")
    try:
        asyncio.run(supervise(path))
    except LocalError as error:
        write_progress(path, Progress(pid=os.getpid(), failure=str(error)))
        sys.exit(str(error))
    except asyncio.CancelledError:
        _log.info("stopped")
    forget_progress(path)


if __name__ == "__main__":
    main()
