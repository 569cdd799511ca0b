"""Virtual environments for what shall not be in ours: made once, kept in the user's cache."""

import asyncio
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Final

import platformdirs

_DONE: Final = "installed"  # the file that says that an environment is complete


class NotInstalledError(Exception):
    """A package cannot be had here."""


async def environment_of(package: str, release: str) -> Path:
    """The `bin` directory of an environment that has the package, with our numpy. Raises `NotInstalledError`."""
    place = platformdirs.user_cache_path("fedota") / "benchmarks" / f"{package}-{release}"
    if not (place / _DONE).exists():
        print(f"installing {package} {release} into {place} (once) …", flush=True)
        await _install(place, f"{package}=={release}", f"numpy=={version('numpy')}")
        (place / _DONE).touch()
    return place / "bin"


async def _install(place: Path, *requirements: str) -> None:
    await asyncio.to_thread(venv.create, place, clear=True, with_pip=True)
    python = str(place / "bin" / "python")
    process = await asyncio.create_subprocess_exec(
        *(python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *requirements),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    if process.returncode != 0:
        raise NotInstalledError((said.decode().strip().splitlines() or ["pip said nothing"])[-1])
