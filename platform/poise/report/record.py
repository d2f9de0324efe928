"""What the report knows of a run, read from its place in the store."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from poise.errors import DamagedError
from poise.observe.rows import read_rows, schema

if TYPE_CHECKING:
    from poise.store.runs import Run

__all__ = ["RunRecord", "count_failures", "is_alarm", "load_record", "when"]

T = TypeVar("T")

ALARMS = ("alarm", "damage", "error", "fail", "kill", "lost", "restart", "torn")


@dataclass(frozen=True)
class RunRecord:
    """A run as the report sees it. Whatever is not there yet is empty; the page says so.

    `summary` is artifacts/summary.json: accuracies in [0, 1] by checkpoint ("best", "final") and measure ("clean",
    "robust/<threat>", "robust/average", "robust/union") on `examples` images, and the attacks in words. `damages` names
    each file that is missing or damaged, and says what is wrong with it.
    """

    name: str
    kind: str = ""
    spec_text: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    rows: pa.Table = field(default_factory=lambda: schema().empty_table())
    events: list[dict[str, Any]] = field(default_factory=list)
    status: str = "unknown"
    error: str | None = None
    damages: Sequence[str] = ()

    @property
    def examples(self) -> int:
        return int(self.summary.get("examples") or 0)

    @property
    def checkpoints(self) -> list[str]:
        """The evaluated checkpoints, the selected one first."""
        return sorted(self.summary.get("accuracy") or {}, key=lambda name: name != self.summary.get("selected"))

    def accuracy(self, checkpoint: str | None = None) -> dict[str, float]:
        """Accuracies by measure, without the prefix `robust/`; of the selected checkpoint by default, {} if none."""
        checkpoint = checkpoint or next(iter(self.checkpoints), "")
        values = (self.summary.get("accuracy") or {}).get(checkpoint) or {}
        return {name.removeprefix("robust/"): math.nan if v is None else float(v) for name, v in values.items()}


def is_alarm(event: Mapping[str, Any]) -> bool:
    """Whether an event tells of a failure: a damaged checkpoint, an error, a start that had to go on from a commit."""
    name = str(event.get("event", "")).lower()
    return any(word in name for word in ALARMS) or (name == "start" and bool(event.get("attempt") or event.get("step")))


def count_failures(events: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many failures the run went on from by itself, and how many commands ended with an error.

    A start that goes on from a commit counts as a failure unless an earlier event says how the command before it ended:
    after an error, somebody has started the run again, perhaps with other code.
    """
    survived = ended = 0
    is_explained = False
    for event in events:
        name = event.get("event")
        if name in ("failed", "interrupted", "preempted"):
            ended += name == "failed"
            is_explained = True
            continue
        survived += is_alarm(event) and not (name == "start" and is_explained)
        is_explained = is_explained and name != "start"
    return survived, ended


def when(value: Any) -> str:
    """Epoch seconds or ISO text as `YYYY-MM-DD hh:mm:ss` (UTC); nothing for None."""
    if isinstance(value, (int, float)) and abs(value) < 1e11:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return str(value or "").replace("T", " ").removesuffix("Z")


def load_record(run: Run) -> RunRecord:
    """Read everything the page shows of `run`; files that a young run does not have yet are empty.

    A file that is damaged is left out and named by an event of the record. StoreError when the store cannot be read.
    """
    damages: list[DamagedError] = []
    state = run.summary()
    manifest = None if state.status == "damaged" else run.manifest()
    keys = [name for name in run.committed_files("metrics/") if name.endswith(".parquet")]
    blobs = [_read(run, key, _sound_rows, damages) for key in keys]
    return RunRecord(
        name=run.name,
        kind="" if state.kind == "?" else state.kind,
        spec_text=_read(run, "spec.yaml", lambda blob: blob.decode(errors="replace"), damages) or "",
        environment=_read(run, "environment.json", _json, damages) or {},
        summary=_read(run, "artifacts/summary.json", _json, damages) or {},
        rows=read_rows(filter(None, blobs)),
        events=run.events() + [{"event": "damaged", "what": str(damage)} for damage in damages],
        status=state.status,
        error=manifest.error if manifest else None,
        damages=[str(damage) for damage in damages],
    )


def _read(run: Run, relative: str, parse: Callable[[bytes], T], damages: list[DamagedError]) -> T | None:
    """A file of the run, or None where there is none or, which adds to `damages`, a damaged one."""
    try:
        return parse(run.read(relative))
    except FileNotFoundError:
        return None
    except (DamagedError, ValueError) as error:
        file = f"{run.url}/{relative}"
        damages.append(DamagedError(str(error) if str(error).startswith(file) else f"{file} is damaged: {error}"))
        return None


def _sound_rows(blob: bytes) -> bytes:
    read_rows([blob])
    return blob


def _json(blob: bytes) -> dict[str, Any]:
    values = json.loads(blob)
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    return values
