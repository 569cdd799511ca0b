"""A checkpoint's manifest: what it was made of, and how. It lies beside the checkpoint in the object store."""

from collections.abc import Sequence

import msgspec

from fedota.events import to_json
from fedota.events.rounds import Contribution
from fedota.runtime.coordinator.state import Result, Rules
from fedota.runtime.protocol import ModelRef


def manifest(
    rules: Rules, round_: int, attempt: int, base: ModelRef, result: Result, contributions: Sequence[Contribution]
) -> bytes:
    """The manifest, as JSON. Unlike the round's report it names all contributions, however many they are."""
    plan = rules.plan
    return msgspec.json.format(
        to_json(
            {
                "problem_id": rules.problem_id,
                "run": rules.run,
                "round": round_,
                "attempt": attempt,
                "sha256": result.model.sha256,
                "size": result.model.size,
                "base": base,
                "strategy": plan.strategy,
                "caps": {
                    "clients_per_organization": plan.clients_per_organization,
                    "examples_per_update": plan.examples_per_update,
                    "clip_norm": plan.clip_norm,
                },
                "updates": result.reported,
                "examples": result.examples,
                "participants": result.participants,
                "contributions": contributions,
                "metrics": result.metrics,
            }
        ),
        indent=2,
    )
