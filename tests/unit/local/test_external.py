"""What a local platform is told: a store elsewhere, with whose keys checkpoints go there, where clients come from."""

from pathlib import Path

import pytest

from fedota.kernel.migrations import PROCESSES
from fedota.kernel.settings import load
from fedota.local.external import External
from fedota.local.nats_server import NatsAccess
from fedota.local.platform import _settings
from fedota.local.seaweedfs import S3Access
from fedota.local.servers import Servers
from fedota.local.state import DataDirectory, LocalError

STORE = {"FEDOTA_S3_URL": "https://s3.test", "FEDOTA_S3_ACCESS_KEY": "own", "FEDOTA_S3_SECRET_KEY": "own secret"}
AUDIT = {"FEDOTA_S3_AUDIT_ACCESS_KEY": "audit", "FEDOTA_S3_AUDIT_SECRET_KEY": "audit secret"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, S3Access("https://s3.test", "own", "own secret", "fedota-audit")),
        (AUDIT, S3Access("https://s3.test", "audit", "audit secret", "fedota-audit")),
        ({"FEDOTA_S3_BUCKET": "x"}, S3Access("https://s3.test", "own", "own secret", "x-audit")),
        (
            {"FEDOTA_S3_REGION": "eu-central-2"},
            S3Access("https://s3.test", "own", "own secret", "fedota-audit", "eu-central-2"),
        ),
        ({"FEDOTA_S3_AUDIT_BUCKET": "y"}, S3Access("https://s3.test", "own", "own secret", "y")),
    ],
)
def test_checkpoints_have_a_bucket_of_their_own(more: dict[str, str], expected: S3Access) -> None:
    """And keys of their own, where these are given."""
    external = load(External, {**STORE, **more})
    external.require_whole()
    assert external.s3_audit == {"notary": expected, "auditor": expected}
    assert external.s3 and external.s3.bucket != expected.bucket
    assert external.s3.region == expected.region


def test_the_region_reaches_who_signs_for_it(tmp_path: Path) -> None:
    """Storage, notary and auditor: a signature for another region is refused by most stores."""
    external = load(External, {**STORE, "FEDOTA_S3_REGION": "eu-central-2"})
    assert external.s3
    nats = NatsAccess("nats://127.0.0.1:1", dict.fromkeys(PROCESSES, tmp_path))
    servers = Servers("postgresql://a:b@127.0.0.1:1/x", nats, external.s3, s3_audit=external.s3_audit)
    data = DataDirectory(tmp_path)
    told = [_settings(data, servers, name)["s3_region"] for name in ("storage", "notary", "auditor")]
    assert told == ["eu-central-2"] * 3


def test_half_of_a_key_is_refused() -> None:
    """It would be taken for none at all, and storage's keys be used."""
    for name, value in AUDIT.items():
        with pytest.raises(LocalError, match="need each other"):
            load(External, {**STORE, name: value}).require_whole()


def test_without_a_store_elsewhere_there_is_nothing() -> None:
    """The embedded one is used."""
    assert load(External, AUDIT).s3_audit == {}


def test_the_orchestrator_is_told_what_was_given_of_the_selectors() -> None:
    """What was not is its own affair."""
    assert load(External, {}).selectors == {}
    told = {"FEDOTA_SELECTORS_HOST": "fl.hospital.test", "FEDOTA_SELECTORS_TLS": "true"}
    assert load(External, told).selectors == {"selectors_host": "fl.hospital.test", "selectors_tls": True}
    assert load(External, {"FEDOTA_SELECTORS_BIND": "10.0.0.1"}).selectors == {"selectors_bind": "10.0.0.1"}
    assert load(External, {"FEDOTA_FAREWELL": "0"}).selectors == {"farewell": 0.0}
