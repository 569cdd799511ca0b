"""`fedota demo`: plays the story on the terminal, and prints its result."""

import asyncio
import shlex
import sys
from pathlib import Path

import msgspec
from rich.console import Console

from fedota.local.demo.screen import Screen
from fedota.local.demo.story import Result, play
from fedota.local.report import tell_access
from fedota.local.signals import stop_at_signals


def run_demo(directory: Path, *, as_json: bool, keep: bool) -> None:
    """Play in an empty directory. Raises `LocalError` when the story does not come to its end."""
    console = Console(stderr=as_json, highlight=False)
    try:
        result = asyncio.run(_play(directory, Screen(console), keep=keep))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    console.print(f"\nDone in {result.seconds:.0f} seconds; {sum(result.events.values())} events are in the log.")
    if keep:
        tell_access(directory / "platform", result.gateway_url, to_stderr=as_json)
        console.print(f"Remove all of it after that: rm -r {shlex.quote(str(directory))}", soft_wrap=True)
    if as_json:
        _print(result)


async def _play(directory: Path, screen: Screen, *, keep: bool) -> Result:
    stop_at_signals()
    return await play(directory, screen, keep=keep)


def _print(result: Result) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(result)).decode() + "\n")
