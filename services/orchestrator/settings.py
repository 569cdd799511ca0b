"""What the orchestrator is told."""

from pathlib import Path

from fedota.kernel.settings import ProcessSettings


class Settings(ProcessSettings, frozen=True, kw_only=True):
    """What the launched processes need, and where they live.

    `runtime_directory` (default: `namespaces` in `directory`) holds one directory a namespace. `token_public_key_file`
    is the public key (PEM) that selectors verify participation tokens with. Coordinators reach NATS at
    `runtime_nats_url` (default: `nats_url`), in one of two ways:

    - With `operator_seed_file`, `system_credentials` and `platform_account` (its public key) each problem gets a NATS
      account of its own, and reaches its own subjects only.
    - With `runtime_credentials`, for a NATS server without operator mode, every coordinator gets a copy of that file.
      Problems are then not isolated from each other: whoever takes over one coordinator can speak for all.
    """

    token_public_key_file: Path
    runtime_directory: Path | None = None
    runtime_nats_url: str = ""
    operator_seed_file: Path | None = None
    system_credentials: Path | None = None
    platform_account: str = ""
    runtime_credentials: Path | None = None

    def __post_init__(self) -> None:
        if not (self.runtime_directory or self.directory):
            raise ValueError("runtime_directory says where namespaces live, and is missing")
        operator = (self.operator_seed_file, self.system_credentials, self.platform_account)
        if any(operator) and (self.runtime_credentials or not all(operator)):
            raise ValueError(
                "operator_seed_file, system_credentials and platform_account belong together, without "
                "runtime_credentials"
            )
        if not any(operator) and not self.runtime_credentials:
            raise ValueError(
                "operator_seed_file, system_credentials and platform_account give each problem its own NATS account, "
                "and are missing; for a NATS server without operator mode runtime_credentials stands in their place"
            )

    @property
    def namespaces_directory(self) -> Path:
        """Where namespaces live."""
        if self.runtime_directory:
            return self.runtime_directory
        assert self.directory
        return self.directory / "namespaces"
