"""A launched component's certificate."""

import os
from pathlib import Path
from typing import Any

import aiohttp
from structlog.testing import capture_logs

from services.orchestrator.launchers.component import Component, Pace, Program
from services.orchestrator.launchers.files import CERTIFICATE


def _nobody(*_: Any) -> Any:
    raise AssertionError("nobody is told, and nothing is started")


async def test_a_certificate_that_cannot_be_renewed_is_at_the_next_look(tmp_path: Path) -> None:
    """The one before it is good for months yet: a full disk now must not end a selector that is well."""
    path = tmp_path / CERTIFICATE
    path.write_bytes(b"old")
    os.utime(path, (1, 1))
    program = Program("selector-0", "module", tmp_path, 1, _nobody, certificate=lambda: b"new")
    in_the_way = tmp_path / f"{CERTIFICATE}.new"
    in_the_way.mkdir()
    async with aiohttp.ClientSession() as http:
        component = Component(program, _nobody, http, Pace())
        with capture_logs() as logs:
            component._renew()
        assert [(line["log_level"], line["component"]) for line in logs] == [("warning", "selector-0")]
        assert path.read_bytes() == b"old"
        in_the_way.rmdir()
        component._renew()
        assert path.read_bytes() == b"new"
