"""The documents that errors and pages lead to leave nothing out, and tell of nothing that is not there."""

import re
from pathlib import Path

from fedota.errors import CATALOGUE as ERRORS
from fedota.events import CATALOGUE as EVENTS
from gateway.auth import ACTIONS
from gateway.guard import OPEN
from gateway.routes import API, PAGES

_DOCS = Path(__file__).parents[3] / "docs"


def rows(name: str, pattern: str) -> dict[str, str]:
    """The rows of a document's tables whose first cell fits the pattern: what it holds, and the cell after it."""
    text = (_DOCS / name).read_text()
    return dict(re.findall(rf"^\| `({pattern})` \| ([^|]*) \|", text, re.MULTILINE))


def test_every_error_is_explained() -> None:
    """With its status, once; a code that was dropped is not told of any more."""
    assert {code: int(status) for code, status in rows("errors.md", "[a-z_]+").items() if status.isdecimal()} == {
        code: kind.status for code, kind in ERRORS.items()
    }


def test_every_route_is_described_with_its_roles() -> None:
    """Each method and path, and who may."""
    told = rows("api.md", "(?:GET|POST|PATCH|DELETE) [^`]+")
    for route in (*API, *PAGES):
        roles = ACTIONS[route.action]
        expected = (
            "all" if len(roles) == 3 else ", ".join(sorted(roles, key=["setter", "organization", "operator"].index))
        )
        assert told.pop(f"{route.method} {route.path}") == expected, route
    assert told.pop("GET /metrics") == "operator"
    assert {(line.split()[1], roles) for line, roles in told.items()} == {(path, "open") for path in OPEN}


def test_every_event_type_is_listed() -> None:
    """They are the values of the parameter `type`."""
    text = (_DOCS / "api.md").read_text()
    assert [name for name in EVENTS if f"`{name}`" not in text] == []
