"""The local authority of one launch: behind the certificates of its selectors, and trusted by its clients alone.

It lives as long as the namespace does. Its key is in a directory of its own that no launched process is told of.
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedota.kernel.files import private_directory, write_private
from fedota.tls import client_context

DIRECTORY: Final = "authority"
_KEY: Final = "key.pem"
_CERTIFICATE: Final = "certificate.pem"
_AUTHORITY_DAYS: Final = 3650  # no training lasts as long
_DAYS: Final = 90
_SLOW_CLOCKS: Final = timedelta(days=1)  # a client's clock may be that far behind
_NO_USAGE: Final = dict.fromkeys(
    (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ),
    False,
)
_log = structlog.get_logger(__name__)


class Authority(NamedTuple):
    """Issues certificates; `pem` is its own, for those who are to trust it."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def of(cls, namespace: Path) -> "Authority":
        """The authority of a namespace's directory, made when there is none that can be used."""
        directory = private_directory(namespace / DIRECTORY)
        try:
            return _read(directory)
        except FileNotFoundError:
            return _made(directory, namespace.name)
        except ValueError as error:  # whoever trusted it needs a new kit, which its certificate in the log will bring
            _log.warning("the authority is damaged and made anew", namespace=namespace.name, error=str(error))
            return _made(directory, namespace.name)

    @property
    def pem(self) -> str:
        """Its certificate."""
        return _text(self.certificate)

    def issue(self, name: str, hosts: Sequence[str]) -> bytes:
        """A new key and a certificate for a server at these names and addresses, as one PEM file."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys(hosts)])
        signer = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            _begun(name, key.public_key(), issuer=self.certificate.subject, days=_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**{**_NO_USAGE, "digital_signature": True}), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer), critical=False)
            .add_extension(names, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return _key_bytes(key) + _text(certificate).encode()


def _made(directory: Path, name: str) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    certificate = (
        _begun(name, key.public_key(), issuer=subject, days=_AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**{**_NO_USAGE, "key_cert_sign": True, "crl_sign": True}), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_private(directory / _KEY, _key_bytes(key))
    write_private(directory / _CERTIFICATE, _text(certificate).encode())
    return Authority(key, certificate)


def _read(directory: Path) -> Authority:
    """What was written there. Raises `FileNotFoundError` or, when it is not a key and its certificate, `ValueError`."""
    text = (directory / _CERTIFICATE).read_bytes()
    key = serialization.load_pem_private_key((directory / _KEY).read_bytes(), password=None)
    certificate = x509.load_pem_x509_certificate(text)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError("the key and the certificate are not of each other")
    client_context(text.decode())
    return Authority(key, certificate)


def _begun(name: str, key: ec.EllipticCurvePublicKey, *, issuer: x509.Name, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLOW_CLOCKS)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _text(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
