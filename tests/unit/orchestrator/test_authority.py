"""The authority of a launch: what it keeps, and what its certificates are good for."""

import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedota.tls import client_context
from services.orchestrator.launchers.authority import DIRECTORY, Authority


def handshake(client: ssl.SSLContext, certificate: Path, host: str) -> x509.Certificate:
    """What a server with this certificate shows to a client that asks for `host`; raises what the client objects to."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server, server_hostname=host)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (asking, answering, asking, answering):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert asking.version() == "TLSv1.3"
    return x509.load_der_x509_certificate(asking.getpeercert(binary_form=True) or b"")


def issued(authority: Authority, directory: Path, *hosts: str) -> Path:
    """A file as a selector finds it."""
    path = directory / "tls.pem"
    path.write_bytes(authority.issue("selector-0", hosts))
    return path


@pytest.mark.parametrize("host", ["selectors.hospital.test", "10.1.2.3", "fd00::7", "127.0.0.1"])
def test_a_certificate_is_good_for_its_hosts(tmp_path: Path, host: str) -> None:
    """Names and addresses alike, by the strictest rules that there are, and for nothing else."""
    authority = Authority.of(tmp_path)
    client = client_context(authority.pem)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    path = issued(authority, tmp_path, "selectors.hospital.test", "10.1.2.3", "fd00::7", "127.0.0.1", "127.0.0.1")
    handshake(client, path, host)
    for other in ("hospital.test", "10.1.2.4", "a.selectors.hospital.test"):
        with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
            handshake(client, path, other)


def test_only_the_own_authority_is_trusted(tmp_path: Path) -> None:
    """Neither that of another problem, nor those of the system; and what is issued issues nothing itself."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    mine, other = Authority.of(tmp_path / "mine"), Authority.of(tmp_path / "other")
    path = issued(other, tmp_path, "127.0.0.1")
    for client in (client_context(mine.pem), ssl.create_default_context()):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(client, path, "127.0.0.1")
    certificate = handshake(client_context(other.pem), path, "127.0.0.1")
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and not constraints.value.ca
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature and not usage.key_cert_sign


def test_it_is_good_for_as_long_as_is_said(tmp_path: Path) -> None:
    """A clock that is behind by hours does no harm."""
    certificate = x509.load_pem_x509_certificate(Authority.of(tmp_path).issue("selector-0", ["127.0.0.1"]))
    now = datetime.now(UTC)
    assert certificate.not_valid_before_utc < now - timedelta(hours=23)
    assert now + timedelta(days=89) < certificate.not_valid_after_utc < now + timedelta(days=91)


def test_it_stays_the_same_and_its_key_stays_with_it(tmp_path: Path) -> None:
    """Private files in a private directory; what it gives out has another key each time."""
    first = Authority.of(tmp_path)
    assert Authority.of(tmp_path).pem == first.pem
    directory = tmp_path / DIRECTORY
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    own = first.key.private_numbers().private_value
    keys = set()
    for _ in range(2):
        key = serialization.load_pem_private_key(first.issue("selector-0", ["127.0.0.1"]), password=None)
        keys.add(key.private_numbers().private_value)  # type: ignore[union-attr]
    assert len(keys) == 2 and own not in keys
    assert "PRIVATE" not in first.pem


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: (directory / "key.pem").unlink(),
        lambda directory: (directory / "certificate.pem").unlink(),
        lambda directory: (directory / "key.pem").write_bytes(b""),
        lambda directory: (directory / "certificate.pem").write_bytes(b"made up"),
        lambda directory: (directory / "key.pem").write_bytes(_another_key(directory)),
    ],
)
def test_what_is_damaged_is_made_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """A launch is not held up by it, and is told from the authority before."""
    first = Authority.of(tmp_path)
    damage(tmp_path / DIRECTORY)
    second = Authority.of(tmp_path)
    assert second.pem != first.pem
    handshake(client_context(second.pem), issued(second, tmp_path, "127.0.0.1"), "127.0.0.1")


def _another_key(directory: Path) -> bytes:
    return Authority.of(directory).issue("x", ["127.0.0.1"])
