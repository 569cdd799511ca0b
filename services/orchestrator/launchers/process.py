"""Coordinators and selectors as child processes of the orchestrator, each in a directory of its own.

`<runtime directory>/<namespace>/<component>/` holds what a process is told and what it writes. It outlives the
orchestrator: after a restart the same run gets the same key and the same ports from it.
"""

import asyncio
import fcntl
import os
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp
import structlog

from services.orchestrator.domain import COORDINATOR, Infra, Spec, problem_of
from services.orchestrator.launchers import Change
from services.orchestrator.launchers.component import Pace
from services.orchestrator.launchers.files import private_directory, recall, write_private
from services.orchestrator.launchers.namespace import BACKEND, Access, Modules, Namespace

_CLOSING_GRACE: Final = 3.0  # seconds: the orchestrator goes, the training does not end
_CREDENTIALS: Final = "nats.creds"
_log = structlog.get_logger(__name__)
