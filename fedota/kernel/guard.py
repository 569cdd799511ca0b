"""Stands between a parent and one child process, so that the child never outlives the parent: `spawn` runs this file.

A process killed with -9 cannot tidy up. The guard's standard input is a pipe from the parent, and it ends however the
parent ends; the guard then ends the child and all of the child's process group. Should the guard itself be killed, the
kernel kills the child (Linux only). Run with `python -I -S`, so nothing but the standard library is at hand.

    guard.py <grace seconds> <stop signal> <program> [<argument> …]

SIGTERM asks the child to stop, with its stop signal; SIGQUIT kills its group at once. The guard ends as the child did.
"""

import ctypes
import os
import select
import signal
import sys
import time
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD)


def main(grace: float, stop_signal: int, argv: list[str]) -> None:
    """Run the child to its end and end the same way."""
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in _WATCHED:
        signal.signal(number, lambda *_: None)
    child = _start(argv)
    status = _watch(child, woken, grace, stop_signal)
    _kill(child)  # grandchildren that the child left behind
    _end_as(status)


def _start(argv: list[str]) -> int:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for number in _WATCHED:
            signal.signal(number, signal.SIG_DFL)
        os.execvp(argv[0], argv)  # noqa: S606 - a shell has no place here
    except OSError as error:
        os.write(2, f"{argv[0]} cannot be run: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _watch(child: int, woken: int, grace: float, stop_signal: int) -> int:
    """Wait for the child's end, and hasten it when the parent asks for that or has gone."""
    watched, deadline = [0, woken], None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select(watched, [], [], left)
        numbers = os.read(woken, 4096) if woken in readable else b""
        orphaned = 0 in readable and not os.read(0, 4096)
        if orphaned:
            watched = [woken]
            deadline = time.monotonic() + grace
        if orphaned or signal.SIGTERM in numbers or signal.SIGINT in numbers:
            os.kill(child, stop_signal)
        if signal.SIGQUIT in numbers or (deadline is not None and time.monotonic() >= deadline):
            _kill(child)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # nobody is left in it; macOS says so with EPERM
        os.killpg(group, signal.SIGKILL)


def _end_as(status: int) -> None:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
