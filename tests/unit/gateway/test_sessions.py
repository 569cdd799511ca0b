"""Sessions and the guard against other sites."""

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from fedota.errors import FedotaError
from gateway.auth import Identity
from gateway.sessions import LIFETIME, Sessions, require_same_origin

_SETTER = Identity(role="setter")
_WHOSE = {"digest": _SETTER}


def request(method: str = "GET", **headers: str) -> web.Request:
    """A request with these headers."""
    return make_mocked_request(method, "/", headers={name.replace("_", "-"): value for name, value in headers.items()})


def cookie(response: web.Response) -> str:
    """The cookie that a response sets, as the browser would send it."""
    (morsel,) = response.cookies.values()
    return f"{morsel.key}={morsel.value}"


def test_a_session_ends_with_its_time() -> None:
    """It is good for its lifetime and not a second longer."""
    now = 0.0
    sessions = Sessions(https=False, whose=_WHOSE.get, clock=lambda: now)
    response = web.Response()
    sessions.start(request(), response, "digest")
    browser = request(Cookie=cookie(response))
    assert sessions.find(browser) == _SETTER
    now = LIFETIME - 1
    assert sessions.find(browser) == _SETTER
    now = LIFETIME
    assert sessions.find(browser) is None
    now = 0.0
    assert sessions.find(browser) is None


def test_only_so_many_sessions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest gives way, so memory is bounded."""
    monkeypatch.setattr("gateway.sessions._MOST", 2)
    sessions = Sessions(https=False, whose=_WHOSE.get)
    browsers = []
    for _ in range(3):
        response = web.Response()
        sessions.start(request(), response, "digest")
        browsers.append(request(Cookie=cookie(response)))
    assert [sessions.find(browser) for browser in browsers] == [None, _SETTER, _SETTER]


def test_a_session_ends_with_its_token() -> None:
    """It is whose the token is now, and nobody's once the token has gone; a token that comes back begins no old one."""
    whose = dict(_WHOSE)
    sessions, response = Sessions(https=False, whose=whose.get), web.Response()
    sessions.start(request(), response, "digest")
    browser = request(Cookie=cookie(response))
    whose["digest"] = Identity(role="operator")
    assert sessions.find(browser) == Identity(role="operator")
    del whose["digest"]
    assert sessions.find(browser) is None
    whose |= _WHOSE
    assert sessions.find(browser) is None


def test_over_https_the_cookie_is_bound_to_the_host() -> None:
    """Neither a neighbour's host nor plain HTTP can set or see it."""
    response = web.Response()
    Sessions(https=True, whose=_WHOSE.get).start(request(), response, "digest")
    (morsel,) = response.cookies.values()
    assert (morsel.key, morsel["secure"], morsel["path"], morsel["domain"]) == ("__Host-fedota", True, "/", "")


@pytest.mark.parametrize(
    ("headers", "same"),
    [
        ({"Sec_Fetch_Site": "same-origin"}, True),
        ({"Sec_Fetch_Site": "none"}, True),
        ({"Sec_Fetch_Site": "cross-site", "Origin": "http://fedota.test"}, False),
        ({"Origin": "http://fedota.test"}, True),
        ({"Origin": "http://fedota.test:81"}, False),
        ({"Origin": "http://x@fedota.test.evil"}, False),
        ({"Origin": "null"}, False),
        ({}, False),
    ],
)
def test_changes_come_from_our_own_pages(headers: dict[str, str], same: bool) -> None:
    """Reading is not a change; everything else shows where it comes from."""
    require_same_origin(request("GET", Host="fedota.test", **headers))
    if same:
        require_same_origin(request("POST", Host="fedota.test", **headers))
    else:
        with pytest.raises(FedotaError, match="forbidden"):
            require_same_origin(request("POST", Host="fedota.test", **headers))
