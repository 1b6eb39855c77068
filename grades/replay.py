"""replay_history, a control: what to freeze at random where another run froze what had converged."""

import json
from collections.abc import Sequence
from pathlib import Path

from grades import policy
from grades.components import Component
from grades.config import GradESConfig
from grades.report import reading_history


def draw_replay(config: GradESConfig, components: Sequence[Component]) -> dict[int, list[str]]:
    """The names of what to freeze at each step; empty without replay_history.

    Raises ValueError for what is no history, and where that run had other components.
    """
    if config.replay_history is None:
        return {}
    with reading_history(f"replay_history {config.replay_history}"):
        events = json.loads(Path(config.replay_history).read_text(encoding="utf-8"))["events"]
    towers = {component.name: component.tower for component in components}
    if odd := sorted({event["name"] for event in events} - set(towers)):
        raise ValueError(
            f"replay_history {config.replay_history}: must be of a run with the same components; "
            f"this model has none named {', '.join(odd)}"
        )
    return policy.replay(events, towers, config.replay_seed)
