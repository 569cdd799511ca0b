"""A trace that began outside goes on into the log."""

from pathlib import Path

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedota.kernel.files import write_private
from gateway import app as gateway
from gateway.settings import Settings
from services.problems import app as problems
from services.problems.settings import Settings as ProblemsSettings
from tests.integration.gateway.conftest import TOKENS, write_tokens
from tests.support.servers import RunningServers
from tests.support.services import Platform, running

NEW = {
    "name": "Tumours",
    "description": "About",
    "data_format": "csv",
    "client_image": "registry.test/image",
    "plan": {"rounds": 3, "goal_count": 2},
}
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
STRANGE = [
    "",
    "x",
    TRACE.upper(),
    f"{TRACE}-more",
    f"ff{TRACE[2:]}",
    "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """What the problems service signs kits with."""
    key = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_private(tmp_path / "tokens.pem", key)
    return tmp_path / "tokens.pem"


async def test_events_carry_the_trace_of_the_request(
    servers: RunningServers, migrated_url: str, tmp_path: Path, key_file: Path
) -> None:
    """In the form of W3C; what has another form is passed over."""
    tokens = write_tokens(tmp_path / "tokens.json")
    headers = {"Authorization": f"Bearer {TOKENS['setter']}"}
    async with (
        Platform.open(servers, migrated_url) as ground,
        running(problems.create_app, ground.settings(ProblemsSettings, "problems", token_key_file=key_file)),
        running(gateway.create_app, ground.settings(Settings, "gateway", tokens_file=tokens)) as door,
        aiohttp.ClientSession(door.url, headers=headers) as setter,
    ):
        for sent in (TRACE, *STRANGE):
            assert (await setter.post("/api/problems", json=NEW, headers={"traceparent": sent})).status == 201
        recorded = [event.traceparent for event in await ground.logs["problems"].read(0)]
    assert recorded == [TRACE, *[None] * len(STRANGE)]
