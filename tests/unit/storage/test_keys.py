"""Which keys may be asked for: a problem's own, and nothing that could lead elsewhere."""

import pytest

from fedota.contracts.commands import AnnouncedFile
from fedota.contracts.runtime import PresignRequest
from fedota.errors import FedotaError
from services.storage.keys import (
    file_key,
    is_problem_id,
    manifest_key,
    require_problem_id,
    require_readable,
    require_writable,
)

PROBLEM = "01890a5d-ac96-774b-bcce-b302099a8057"
OTHER = "01890a5d-ac96-774b-bcce-b302099a8058"
DIGEST = "0123456789abcdef" * 4
HEX = DIGEST[:16]
CHECKPOINT = f"problems/{PROBLEM}/checkpoints/1/12-{HEX}.safetensors"


def wanted(key: str = CHECKPOINT, size: int = 10, sha256: str = DIGEST) -> PresignRequest:
    """A coordinator's wish to write."""
    return PresignRequest(method="PUT", key=key, size=size, sha256=sha256)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "..",
        "*",
        f"{PROBLEM}/",
        f"../{PROBLEM}",
        PROBLEM.upper(),
        PROBLEM.replace("-", ""),
        f"{{{PROBLEM}}}",
        f"{PROBLEM}\n",
        f"urn:uuid:{PROBLEM}",
    ],
)
def test_only_a_uuid_as_we_write_it_is_a_problem_id(text: str) -> None:
    """Two spellings of one id would be two prefixes, and anything else could hold a path."""
    assert not is_problem_id(text)
    with pytest.raises(FedotaError) as refused:
        require_problem_id(text)
    assert refused.value.problem.code == "invalid_field"
    assert "problem_id" in refused.value.problem.fields


def test_a_problem_id_is_accepted() -> None:
    """The ids that the gateway makes."""
    require_problem_id(PROBLEM)


def test_places_are_below_the_problem_and_by_content() -> None:
    """The layout that manifests, events and coordinators rely on."""
    file = AnnouncedFile(name="a.csv", size=1, sha256=DIGEST)
    assert file_key(PROBLEM, file) == f"problems/{PROBLEM}/files/{DIGEST}/a.csv"
    assert manifest_key(PROBLEM) == f"problems/{PROBLEM}/files/manifest.json"


@pytest.mark.parametrize(
    "rest", ["files/manifest.json", f"files/{DIGEST}/a-b_c.v2.csv", f"checkpoints/1/12-{HEX}.safetensors", "_x"]
)
def test_what_lies_below_the_prefix_may_be_read(rest: str) -> None:
    """Files, manifest and checkpoints."""
    require_readable(PROBLEM, f"problems/{PROBLEM}/{rest}")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        f"problems/{PROBLEM}",
        f"problems/{PROBLEM}/",
        f"problems/{OTHER}/files/a",
        f"problems/{PROBLEM}x/files/a",
        f"/problems/{PROBLEM}/files/a",
        f"x/problems/{PROBLEM}/files/a",
        f"problems/{PROBLEM}/../{OTHER}/files/a",
        f"problems/{PROBLEM}/files/..",
        f"problems/{PROBLEM}/files/./a",
        f"problems/{PROBLEM}/files//a",
        f"problems/{PROBLEM}//a",
        f"problems/{PROBLEM}/files/",
        f"problems/{PROBLEM}/files/%2e%2e/a",
        f"problems/{PROBLEM}/files/..\\a",
        f"problems/{PROBLEM}/files/a?acl",
        f"problems/{PROBLEM}/files/a#b",
        f"problems/{PROBLEM}/files/a\n",
        f"problems/{PROBLEM}/files/\0",
        f"problems/{PROBLEM}/files/ä",
    ],
)
def test_what_lies_elsewhere_may_be_neither_read_nor_written(key: str) -> None:
    """Other problems, ways out of the prefix, and spellings that S3 and we could read differently."""
    with pytest.raises(FedotaError) as reading:
        require_readable(PROBLEM, key)
    with pytest.raises(FedotaError) as writing:
        require_writable(PROBLEM, wanted(key))
    assert reading.value.problem.code == writing.value.problem.code == "key_forbidden"


@pytest.mark.parametrize("key", [CHECKPOINT, CHECKPOINT.replace("safetensors", "json")])
def test_a_checkpoint_and_its_manifest_may_be_written(key: str) -> None:
    """The two places of a coordinator."""
    require_writable(PROBLEM, wanted(key))


def test_a_manifests_digest_is_its_own() -> None:
    """A manifest's key holds its checkpoint's digest, so its own is another."""
    require_writable(PROBLEM, wanted(CHECKPOINT.replace("safetensors", "json"), sha256="f" * 64))


@pytest.mark.parametrize(
    "rest",
    [
        f"files/{DIGEST}/model.safetensors",
        "files/manifest.json",
        f"checkpoints/12-{HEX}.safetensors",
        f"checkpoints/0/12-{HEX}.safetensors",
        f"checkpoints/1/0-{HEX}.safetensors",
        f"checkpoints/x/12-{HEX}.safetensors",
        f"checkpoints/1/12-{HEX}.pickle",
        f"checkpoints/1/12-{HEX}.safetensors.json",
        f"checkpoints/1/12-{HEX[:-1]}.safetensors",
        f"checkpoints/1/12-{HEX.upper()}.safetensors",
        f"checkpoints/1/x/12-{HEX}.safetensors",
        f"checkpoints/1/12-{HEX}.safetensors\n",
        f"checkpoints/\u0661/12-{HEX}.safetensors",
    ],
)
def test_a_coordinator_writes_nothing_but_checkpoints(rest: str) -> None:
    """The setter's files are read-only to it, and a key is spelled in one way."""
    with pytest.raises(FedotaError) as refused:
        require_writable(PROBLEM, wanted(f"problems/{PROBLEM}/{rest}"))
    assert refused.value.problem.code == "key_forbidden"


@pytest.mark.parametrize(
    ("field", "wish"),
    [
        ("size", wanted(size=0)),
        ("size", wanted(size=-1)),
        ("size", wanted(size=5 * 1024**3 + 1)),
        ("sha256", wanted(sha256="")),
        ("sha256", wanted(sha256=DIGEST.upper())),
        ("sha256", wanted(sha256=f"{DIGEST}\n")),
    ],
)
def test_a_put_needs_size_and_digest(field: str, wish: PresignRequest) -> None:
    """Without them a URL would take any bytes."""
    with pytest.raises(FedotaError) as refused:
        require_writable(PROBLEM, wish)
    assert refused.value.problem.code == "invalid_field"
    assert list(refused.value.problem.fields) == [field]


def test_a_checkpoints_key_holds_its_own_digest() -> None:
    """Else an object that is there already could be another one."""
    with pytest.raises(FedotaError) as refused:
        require_writable(PROBLEM, wanted(sha256="f" * 64))
    assert refused.value.problem.code == "key_forbidden"
