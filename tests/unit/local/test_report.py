"""What is said of a platform that does not answer: what is so, and what to type next, wherever the platform is."""

import shlex
from pathlib import Path

import pytest

from fedota.local import background
from fedota.local.background import Progress, write_progress
from fedota.local.report import show_status
from fedota.local.state import LocalError, held, own_directory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A data directory whose name has a space, not there yet."""
    return tmp_path / "my data"


def said(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `fedota status` prints of a platform that is not up."""
    assert not show_status(path)
    out = capsys.readouterr().out
    assert not show_status(path, as_json=True)
    assert capsys.readouterr() == ("", out), "who reads JSON gets the words on stderr"
    return out


def test_where_nothing_was_ever_started(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong --data-dir is not taken for a platform that is stopped, and nothing is made there."""
    start = f"fedota up --data-dir {shlex.quote(str(path))}"
    assert said(path, capsys) == f"There is no platform in {path}. Start one here with: {start}\n"
    with pytest.raises(LocalError, match=r"There is no platform in .*Say with --data-dir where it is"):
        background.stop(path)
    assert not path.exists()


def test_one_that_is_stopped(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command starts that one, not another in the default directory."""
    with held(path):
        pass
    start = f"fedota up --data-dir {shlex.quote(str(path))}"
    assert said(path, capsys) == f"The platform in {path} does not run. Start it with: {start}\n"
    assert not background.stop(path)


def test_one_that_could_not_start(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why is still known to who looks later."""
    with held(path):
        write_progress(path, Progress(pid=1, failure="The disk is full."))
    assert said(path, capsys).splitlines()[1:] == ["Its last start failed: The disk is full."]


def test_one_that_starts(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How far it is; who starts it again is told how to look."""
    with held(path):
        assert said(path, capsys) == f"The platform in {path} is starting or stopping.\n"
        write_progress(path, Progress(pid=1, up=["postgres", "nats"]))
        assert said(path, capsys) == f"The platform in {path} is starting or stopping. Up: postgres, nats\n"
        look = f"Look again: fedota status --data-dir {shlex.quote(str(path))}"
        with pytest.raises(LocalError, match=look):
            background.start(path, print)


def test_a_directory_in_which_others_keep_things(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is no platform either."""
    path.mkdir()
    (path / "thesis.txt").touch()
    assert said(path, capsys).startswith("There is no platform in ")
    with pytest.raises(LocalError, match="holds other things"):
        own_directory(path)
