"""Run the platform until SIGTERM or SIGINT: `python -m fedota.local DATA_DIRECTORY`."""

import asyncio
import os
import sys
from pathlib import Path

import asyncpg
import structlog

from fedota.kernel.migrations import MigrationError
from fedota.kernel.service import configure_logging
from fedota.kernel.settings import SettingsError, load
from fedota.local.background import LOG, Progress, forget_progress, write_progress
from fedota.local.external import External
from fedota.local.platform import running
from fedota.local.signals import stop_at_signals
from fedota.local.state import LocalError, held

_log = structlog.get_logger(__name__)


async def supervise(path: Path) -> None:
    """Keep the platform alive, and say how far it is. Raises `LocalError` when it cannot start."""
    stop_at_signals()
    with held(path):  # before anything is said: there may be another one, and it has the word
        progress = Progress(pid=os.getpid())

        def tell(name: str) -> None:
            progress.up.append(name)
            write_progress(path, progress)

        write_progress(path, progress)
        try:
            async with running(path, load(External), tell) as platform:
                progress.gateway_url, progress.moved_from = platform.gateway_url, platform.moved_from
                write_progress(path, progress)
                _log.info("ready", url=platform.gateway_url)
                try:
                    await asyncio.Event().wait()
                finally:
                    write_progress(path, Progress(pid=os.getpid()))  # nobody is sent there any more
        except (LocalError, SettingsError, MigrationError) as error:
            raise _failed(path, str(error)) from None
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            why = str(error) or type(error).__name__
            raise _failed(path, f"The platform cannot start: {why}. {path / LOG} says more.") from error
        except asyncio.CancelledError:
            forget_progress(path)
            raise


def _failed(path: Path, why: str) -> LocalError:
    write_progress(path, Progress(pid=os.getpid(), failure=why))
    return LocalError(why)


def main() -> None:
    """The supervisor's life; exits with 1 when the platform cannot start."""
    configure_logging("platform", "info")
    try:
        asyncio.run(supervise(Path(sys.argv[1])))
    except LocalError as error:
        sys.exit(str(error))
    except asyncio.CancelledError:
        _log.info("stopped")


if __name__ == "__main__":
    main()
