"""Every route that asks for a token, as data: method, path, the action that it takes, and who answers."""

from typing import Final, NamedTuple

from gateway import commands, forgetting, operations, pages, queries
from gateway.web_errors import Handler


class Route(NamedTuple):
    """One row of the table. `action` is a key of `gateway.auth.ACTIONS`.

    What answers GET answers HEAD too, but for what never ends (`endless`).
    """

    method: str
    path: str
    action: str
    handler: Handler
    endless: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that it answers."""
        return ("GET", "HEAD") if self.method == "GET" and not self.endless else (self.method,)


_PROBLEM: Final = "/api/problems/{problem}"
_MEMBER: Final = f"{_PROBLEM}/participations/{{organization}}"
_PROJECTION: Final = "/api/projections/{process}"
_LETTER: Final = "/api/deadletters/{process}/{position}"

API: Final = (
    Route("GET", "/api/problems", "read_problems", queries.list_problems),
    Route("POST", "/api/problems", "create_problem", commands.create_problem),
    Route("GET", _PROBLEM, "read_problems", queries.get_problem),
    Route("PATCH", _PROBLEM, "revise_problem", commands.revise_problem),
    Route("POST", f"{_PROBLEM}/uploads", "upload_files", commands.prepare_upload),
    Route("POST", f"{_PROBLEM}/files", "upload_files", commands.store_files),
    Route("GET", f"{_PROBLEM}/files", "read_files", queries.list_files),
    Route("GET", f"{_PROBLEM}/files/{{name}}", "read_files", queries.get_file),
    Route("POST", f"{_PROBLEM}/start", "start_problem", commands.start_problem),
    Route("POST", f"{_PROBLEM}/stop", "stop_problem", commands.stop_problem),
    Route("GET", f"{_PROBLEM}/participations", "read_participations", queries.list_participations),
    Route("POST", f"{_PROBLEM}/participations", "request_participation", commands.request_participation),
    Route("POST", f"{_MEMBER}/approve", "decide_participation", commands.approve_participation),
    Route("POST", f"{_MEMBER}/refuse", "decide_participation", commands.refuse_participation),
    Route("POST", f"{_MEMBER}/revoke", "decide_participation", commands.revoke_participation),
    Route("GET", f"{_MEMBER}/kit", "fetch_kit", queries.get_kit),
    Route("GET", f"{_PROBLEM}/infrastructure", "read_infrastructure", queries.get_infrastructure),
    Route("GET", f"{_PROBLEM}/rounds", "read_rounds", queries.list_rounds),
    Route("GET", f"{_PROBLEM}/rounds/{{round}}", "read_rounds", queries.get_round),
    Route("GET", f"{_PROBLEM}/rounds/{{round}}/checkpoint", "read_model", queries.get_checkpoint),
    Route("GET", f"{_PROBLEM}/contributions", "read_contributions", queries.list_contributions),
    Route("GET", f"{_PROBLEM}/model", "read_model", queries.get_model),
    Route("GET", "/api/events", "read_events", queries.list_events),
    Route("GET", "/api/events/stream", "read_events", queries.stream_events, endless=True),
    Route("GET", "/api/events/{position}", "read_events", queries.get_event),
    Route("GET", "/api/projections", "read_projections", operations.list_projections),
    Route("GET", _PROJECTION, "read_projections", operations.get_projection),
    Route("POST", f"{_PROJECTION}/rebuild", "rebuild_projections", operations.rebuild_projection),
    Route("POST", f"{_PROJECTION}/verify", "verify_projections", operations.verify_projection),
    Route("GET", "/api/deadletters", "read_dead_letters", operations.list_dead_letters),
    Route("GET", _LETTER, "read_dead_letters", operations.get_dead_letter),
    Route("POST", f"{_LETTER}/retry", "retry_dead_letters", operations.retry_dead_letter),
    Route("POST", f"{_LETTER}/drop", "drop_dead_letters", operations.drop_dead_letter),
    Route("GET", "/api/people", "read_people", forgetting.list_people),
    Route("DELETE", "/api/people/{person}", "forget_people", forgetting.forget_person),
)
PAGES: Final = (
    Route("GET", "/", "read_problems", pages.show_problems),
    Route("GET", "/problems/{problem}", "read_problems", pages.show_problem),
    Route("POST", "/sign-out", "sign_out", pages.sign_out),
)
# every process has this route; at this door it tells how much goes on, which is the operator's business
_METRICS: Final = {("GET", "/metrics"): "read_metrics", ("HEAD", "/metrics"): "read_metrics"}
ACTIONS_OF: Final = {
    (method, route.path): route.action for route in (*API, *PAGES) for method in route.methods
} | _METRICS
