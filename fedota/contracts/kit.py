"""The join kit: what an organization's client needs to take part, as one JSON file."""

import msgspec


class Kit(msgspec.Struct, frozen=True, kw_only=True):
    """An organization's way into a problem. `token` proves the participation until `expires` (Unix seconds).

    `authority` is the certificate (PEM) of the authority behind the selectors' own, the only one to be trusted; empty
    where they speak plain HTTP, which they do on one machine only. `page` is where people read how the training goes.
    """

    problem_id: str
    name: str
    organization: str
    token: str
    selectors: list[str]
    expires: int
    authority: str = ""
    page: str = ""
