"""What the rounds service is told: nothing but what every process is."""

from fedota.kernel.settings import ProcessSettings


class Settings(ProcessSettings, frozen=True, kw_only=True):
    """The log, NATS, and its own address."""
