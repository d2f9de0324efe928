"""Events of a run: one dictionary per event, which is a line of events.jsonl."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["event"]


def event(name: str, **facts: Any) -> dict[str, Any]:
    """An event with the present time (epoch seconds), such as `event("commit", step=40)`."""
    return {"event": name, "time": round(time.time(), 3), **facts}
