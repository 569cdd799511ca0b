"""An object store that stands elsewhere: where checkpoints go, and with whose keys."""

import pytest

from fedota.kernel.settings import load
from fedota.local.external import External
from fedota.local.seaweedfs import S3Access
from fedota.local.state import LocalError

STORE = {"FEDOTA_S3_URL": "https://s3.test", "FEDOTA_S3_ACCESS_KEY": "own", "FEDOTA_S3_SECRET_KEY": "own secret"}
AUDIT = {"FEDOTA_S3_AUDIT_ACCESS_KEY": "audit", "FEDOTA_S3_AUDIT_SECRET_KEY": "audit secret"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, S3Access("https://s3.test", "own", "own secret", "fedota-audit")),
        (AUDIT, S3Access("https://s3.test", "audit", "audit secret", "fedota-audit")),
        ({"FEDOTA_S3_BUCKET": "x"}, S3Access("https://s3.test", "own", "own secret", "x-audit")),
        ({"FEDOTA_S3_AUDIT_BUCKET": "y"}, S3Access("https://s3.test", "own", "own secret", "y")),
    ],
)
def test_checkpoints_have_a_bucket_of_their_own(more: dict[str, str], expected: S3Access) -> None:
    """And keys of their own, where these are given."""
    external = load(External, {**STORE, **more})
    external.require_whole()
    assert external.s3_audit == {"notary": expected, "auditor": expected}
    assert external.s3 and external.s3.bucket != expected.bucket


def test_half_of_a_key_is_refused() -> None:
    """It would be taken for none at all, and storage's keys be used."""
    for name, value in AUDIT.items():
        with pytest.raises(LocalError, match="need each other"):
            load(External, {**STORE, name: value}).require_whole()


def test_without_a_store_elsewhere_there_is_nothing() -> None:
    """The embedded one is used."""
    assert load(External, AUDIT).s3_audit == {}
