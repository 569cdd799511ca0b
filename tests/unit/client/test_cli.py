"""`fedota client run`."""

import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from fedota.client.cli import client
from fedota.contracts.kit import Kit

TRAIN = "def train(model, data, config):\n    return model, 1, {}\n"


def kit(expires: float, *selectors: str) -> bytes:
    """A kit's file."""
    made = Kit(
        problem_id="p",
        name="P",
        organization="o",
        token="secret",
        selectors=list(selectors),
        expires=int(expires),
        page="https://fedota.test/problems/p",
    )
    return msgspec.json.encode(made)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is not a join kit"),
        (b"\xff\xfe", "is not a join kit"),
        (b'{"problem_id": "p"}', "is not a join kit"),
        (
            kit(time.time() - 1, "http://127.0.0.1:9"),
            "The join kit has expired. Download a new one from the problem's page (https://fedota.test/problems/p).",
        ),
        (kit(time.time() + 86_400), "names no selector"),
        (
            kit(time.time() + 86_400, "http://127.0.0.1:9"),
            "The training may have ended, or been started anew: look at the problem's page (https://fedota.test/problems/p).",
        ),
        (
            kit(time.time() + 86_400, "https://127.0.0.1:9", "http://10.0.0.1:9"),
            "selector http://10.0.0.1:9, which is not",
        ),
        (kit(time.time() + 86_400, "http://127.0.0.1@evil.test:9"), "Nothing is sent in plain text to another machine"),
        (kit(time.time() + 86_400, "http://localhost.evil.test:9"), "is not an https:// address"),
        (kit(time.time() + 86_400, "ftp://127.0.0.1"), "is not an https:// address"),
        (kit(time.time() + 86_400, "http://[::1:9"), "is not an https:// address"),
    ],
)
def test_what_cannot_work_ends_with_a_sentence(tmp_path: Path, content: bytes | None, said: str) -> None:
    """And an exit code that is not 0; the token is never shown."""
    (tmp_path / "train.py").write_text(TRAIN)
    if content is not None:
        (tmp_path / "kit.json").write_bytes(content)
    arguments = ["--kit", tmp_path / "kit.json", "--data", tmp_path, "--patience", "0.2", tmp_path / "train.py"]
    result = CliRunner().invoke(client, ["run", *map(str, arguments)])
    assert result.exit_code == 1
    assert said in result.stderr and result.stderr.splitlines()[-1].startswith("Error: ")
    assert "secret" not in result.output and "Traceback" not in result.output


def test_a_train_file_that_fails_shows_its_traceback(tmp_path: Path) -> None:
    """For its author to read."""
    (tmp_path / "kit.json").write_bytes(kit(time.time() + 86_400, "http://127.0.0.1:9"))
    (tmp_path / "train.py").write_text("1 / 0\n")
    arguments = ["--kit", tmp_path / "kit.json", "--data", tmp_path, tmp_path / "train.py"]
    result = CliRunner().invoke(client, ["run", *map(str, arguments)])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "1 / 0" in result.stderr
    assert result.stderr.splitlines()[-1].endswith("cannot be loaded: ZeroDivisionError: division by zero.")


def test_help_says_what_to_write() -> None:
    """Where somebody looks first."""
    result = CliRunner().invoke(client, ["run", "--help"])
    assert result.exit_code == 0 and "train(model, data, config)" in result.output
