"""Files for their owner alone, ends of logs, free ports."""

import os
import socket
from pathlib import Path

import pytest

from fedota.kernel.files import free_port, is_free, last_lines, private_directory, write_private


def mode(path: Path) -> int:
    """The permission bits."""
    return path.stat().st_mode & 0o777


def test_a_private_file_is_private_from_its_first_byte(tmp_path: Path) -> None:
    """Whatever the umask, whatever was there before, a symbolic link included."""
    old = os.umask(0)
    try:
        path, other = tmp_path / "secret", tmp_path / "other"
        other.write_bytes(b"other")
        path.symlink_to(other)
        write_private(path, b"one")
        assert (path.read_bytes(), mode(path), path.is_symlink()) == (b"one", 0o600, False)
        assert other.read_bytes() == b"other"
        path.chmod(0o644)
        write_private(path, b"two")
        assert (path.read_bytes(), mode(path)) == (b"two", 0o600)
    finally:
        os.umask(old)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["other", "secret"]


def test_content_is_on_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that loses power leaves the old file or the new one, never an empty one."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append(str(path))
        assert path.is_dir() or os.fstat(descriptor).st_size == 3, "all of it is written by then"
        fsync(descriptor)

    def replaced(draft: Path, target: Path) -> Path:
        done.append("replaced")
        return replace(draft, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_private(tmp_path / "secret", b"one")
    assert done == [str(tmp_path / "secret.new"), "replaced", str(tmp_path)]


def test_a_draft_left_by_a_crash_is_in_nobodys_way(tmp_path: Path) -> None:
    """A planted link beside the file is not followed either."""
    victim = tmp_path / "victim"
    (tmp_path / "secret.new").symlink_to(victim)
    write_private(tmp_path / "secret", b"one")
    assert not victim.exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole or not at all."""
    path = tmp_path / "secret"
    write_private(path, b"one")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_private(path, b"two")
    assert path.read_bytes() == b"one"


def test_a_directory_becomes_private(tmp_path: Path) -> None:
    """Made with its parents, or closed where it stood open."""
    assert mode(private_directory(tmp_path / "a" / "b")) == 0o700
    (tmp_path / "a").chmod(0o755)
    assert mode(private_directory(tmp_path / "a")) == 0o700


def test_the_end_of_a_long_log(tmp_path: Path) -> None:
    """Twenty lines at most, though it is large, not text, or not there."""
    log = tmp_path / "log"
    assert last_lines(log) == []
    log.write_bytes(b"\xff\xfe" * 100_000 + b"\n" + b"".join(b"line %d\n" % number for number in range(30)))
    assert last_lines(log) == [f"line {number}" for number in range(10, 30)]
    log.write_bytes(b"only \xff")
    assert last_lines(log) == ["only \ufffd"]


def test_a_port_that_somebody_has_is_not_free() -> None:
    """Then another one is taken; when it is free again it is taken again, unless it is kept for something else."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        assert free_port("127.0.0.1", port) != port
    assert is_free("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    assert free_port("127.0.0.1", port, {port}) != port


def test_ports_stay_clear_of_outgoing_connections() -> None:
    """One of those would take a port while its server is down."""
    assert all(20_000 <= free_port("127.0.0.1") < 32_000 for _ in range(20))


def test_a_host_that_is_not_ours_is_an_error() -> None:
    """And not a reason to look for another port."""
    with pytest.raises(OSError):
        is_free("192.0.2.1", 0)
