"""The table of roles × actions, cell by cell, and tokens."""

import hashlib
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import structlog

from fedota.errors import FedotaError
from fedota.kernel.settings import SettingsError
from gateway.auth import ACTIONS, Identity, Role, Token, Tokens, TokensFile, digest_of, read_tokens
from gateway.routes import ACTIONS_OF, API, PAGES

_ROLES = ("setter", "organization", "operator")
_TABLE = """
                          setter organization operator
read_problems             yes    yes          yes
create_problem            yes    no           yes
revise_problem            yes    no           yes
start_problem             yes    no           yes
stop_problem              yes    no           yes
read_files                yes    yes          yes
upload_files              yes    no           yes
read_participations       yes    yes          yes
request_participation     no     yes          no
decide_participation      yes    no           yes
fetch_kit                 no     yes          no
read_infrastructure       yes    yes          yes
read_infrastructure_log   yes    no           yes
read_rounds               yes    yes          yes
read_contributions        yes    yes          yes
read_model                yes    no           yes
read_events               yes    yes          yes
read_metrics              no     no           yes
read_projections          no     no           yes
rebuild_projections       no     no           yes
verify_projections        no     no           yes
read_dead_letters         no     no           yes
retry_dead_letters        no     no           yes
drop_dead_letters         no     no           yes
read_people               no     no           yes
forget_people             no     no           yes
sign_out                  yes    yes          yes
"""
_CELLS = [
    (action, role, cell == "yes")
    for action, *cells in map(str.split, _TABLE.strip().splitlines()[1:])
    for role, cell in zip(_ROLES, cells, strict=True)
]


@pytest.mark.parametrize(("action", "role", "allowed"), _CELLS)
def test_cell(action: str, role: Role, allowed: bool) -> None:
    """What a role may do is what this table says, and the refusal names who may."""
    identity = Identity(role=role)
    assert identity.may(action) is allowed
    if allowed:
        identity.require(action)
    else:
        with pytest.raises(FedotaError) as refusal:
            identity.require(action)
        assert refusal.value.problem.code == "forbidden"
        assert all(name in refusal.value.problem.detail for name in ACTIONS[action])


def test_the_table_above_is_complete() -> None:
    """No role, no action and no route is left out."""
    assert {action for action, _, _ in _CELLS} == set(ACTIONS)
    assert set(_ROLES) == set(get_args(Role))
    assert set(ACTIONS_OF.values()) | {"read_infrastructure_log"} == set(ACTIONS)
    assert {(method, route.path) for route in (*API, *PAGES) for method in route.methods} < set(ACTIONS_OF)


def test_tokens_are_known_by_their_digest() -> None:
    """The right token names its role; its digest does not open anything."""
    digest = hashlib.sha256(b"secret").hexdigest()
    tokens = Tokens([Token(role="operator", sha256="0" * 64), Token(role="setter", sha256=digest)])
    assert tokens.identify("secret") == Identity(role="setter")
    assert tokens.identify(digest) is None
    assert tokens.identify("") is None
    assert tokens.identify("\udcff") is None


def test_a_token_of_one_organization_stands_for_no_other() -> None:
    """A bound identity is refused for others; an unbound one is not."""
    Identity(role="organization").require_organization("B")
    bound = Identity(role="organization", organization="A")
    bound.require_organization("A")
    with pytest.raises(FedotaError, match="forbidden"):
        bound.require_organization("B")
    assert (bound.standing, Identity(role="setter").standing) == ("organization:A", "setter")


def test_the_tokens_file(tmp_path: Path) -> None:
    """It is read when only its owner may read it, and every fault of it says what to do."""
    path = tmp_path / "tokens.json"
    with pytest.raises(SettingsError, match="cannot be read"):
        read_tokens(path)
    path.write_bytes(msgspec.json.encode([{"role": "setter", "sha256": hashlib.sha256(b"t").hexdigest()}]))
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        read_tokens(path)
    path.chmod(0o600)
    assert read_tokens(path).identify("t") == Identity(role="setter")
    path.write_text('[{"role": "king", "sha256": ""}]')
    with pytest.raises(SettingsError, match="role"):
        read_tokens(path)
    path.write_bytes(msgspec.json.encode([{"role": "setter", "sha256": "a" * 64, "organization": "A"}]))
    with pytest.raises(SettingsError, match="stands for no organization"):
        read_tokens(path)


def write(path: Path, *entries: dict[str, Any]) -> None:
    """A tokens file with the tokens `t0`, `t1` and so on."""
    known = [{"sha256": digest_of(f"t{number}"), **entry} for number, entry in enumerate(entries)]
    path.write_bytes(msgspec.json.encode(known))
    path.chmod(0o600)


def test_the_tokens_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    """In place, replaced or made readable: with the next question. Else it is not touched."""
    path = tmp_path / "tokens.json"
    write(path, {"role": "setter"}, {"role": "operator", "person": "anna"})
    tokens = TokensFile(path, may_name_people=True)
    first = tokens.current
    assert first.people == {"anna"} and tokens.current is first
    write(path, {"role": "setter"})
    assert tokens.current.identify("t1") is None and tokens.current.people == set()
    write(tmp_path / "draft", {"role": "operator"})
    (tmp_path / "draft").replace(path)
    assert tokens.current.identify("t0") == Identity(role="operator")


@pytest.mark.parametrize("fault", ["gone", "damaged", "open", "people"])
def test_a_tokens_file_that_is_wrong_changes_nothing(tmp_path: Path, fault: str) -> None:
    """Those who were in stay in, the log says once what to do, and the file counts when it is mended."""
    path = tmp_path / "tokens.json"
    write(path, {"role": "setter"})
    tokens = TokensFile(path, may_name_people=False)
    match fault:
        case "gone":
            path.unlink()
        case "damaged":
            path.write_text("[")
        case "open":
            write(path, {"role": "operator"})
            path.chmod(0o644)
        case _:
            write(path, {"role": "operator", "person": "anna"})
    with structlog.testing.capture_logs() as said:
        assert [tokens.current.identify("t0") for _ in range(3)] == [Identity(role="setter")] * 3
    assert [line["log_level"] for line in said] == ["error"] and "anna" not in str(said)
    if fault == "open":
        path.chmod(0o600)
    else:
        write(path, {"role": "operator"})
    assert tokens.current.identify("t0") == Identity(role="operator")
