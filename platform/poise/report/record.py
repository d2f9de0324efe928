"""The record of a run for the report, read from the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from poise.errors import IntegrityError
from poise.observe.rows import read_rows, schema
from poise.store.result import RunResult, kind_of_result, read_result

if TYPE_CHECKING:
    from poise.store.runs import Run

__all__ = ["RunRecord", "count_failures", "is_alarm", "is_failure", "load_record", "when", "with_result"]

T = TypeVar("T")
Result = TypeVar("Result", bound=RunResult)

FAILURES = ("damage", "error", "fail", "kill", "lost", "restart", "torn")
"""Parts of the names of events that report a failure."""


@dataclass(frozen=True)
class RunRecord:
    """What the report shows of a run; parts that do not exist yet are empty.

    Attributes:
        result: None before the run has ended.
        corruptions: a message for each file that is missing or damaged.
    """

    name: str
    kind: str = ""
    spec_text: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    result: RunResult | None = None
    rows: pa.Table = field(default_factory=lambda: schema().empty_table())
    events: list[dict[str, Any]] = field(default_factory=list)
    status: str = "unknown"
    error: str | None = None
    corruptions: Sequence[str] = ()


def with_result(records: Iterable[RunRecord], result_class: type[Result]) -> list[tuple[RunRecord, Result]]:
    """The records whose result is of this class, each with its result."""
    return [(record, record.result) for record in records if isinstance(record.result, result_class)]


def is_failure(event: Mapping[str, Any]) -> bool:
    """Whether an event reports a failure: a damaged checkpoint, an error, a start that continues from a checkpoint."""
    name = str(event.get("event", "")).lower()
    is_restart = name == "start" and bool(event.get("attempt") or event.get("step"))
    return is_restart or any(word in name for word in FAILURES)


def is_alarm(event: Mapping[str, Any]) -> bool:
    """Whether an event is an alarm of a monitor, such as that of overfitting: a finding about the model, no failure."""
    return event.get("event") == "alarm"


def count_failures(events: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many failures the run recovered from by itself, and how many commands ended with an error.

    A start that continues from a checkpoint counts as a failure, unless an earlier event says how the command before it
    ended: in that case the user has started the run again, perhaps with other code.
    """
    survived = 0
    ended = 0
    end_is_recorded = False  # of the command before
    for event in events:
        name = event.get("event")
        if name in ("failed", "interrupted", "preempted"):
            ended += name == "failed"
            end_is_recorded = True
            continue
        survived += is_failure(event) and not (name == "start" and end_is_recorded)
        end_is_recorded = end_is_recorded and name != "start"
    return survived, ended


def when(value: Any) -> str:
    """Epoch seconds or an ISO text as `YYYY-MM-DD hh:mm:ss` (UTC); an empty text for None."""
    if isinstance(value, (int, float)) and abs(value) < 1e11:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return str(value or "").replace("T", " ").removesuffix("Z")


def load_record(run: Run, result_classes: Mapping[str, type[RunResult]]) -> RunRecord:
    """Read everything that the page shows of `run`; files that do not exist yet give empty parts.

    A damaged file is left out and named by an event of the record.

    Args:
        result_classes: the class of the result, by kind.

    Raises:
        StoreError: the store cannot be read.
    """
    corruptions: list[IntegrityError] = []
    state = run.summary()
    manifest = None if state.status == "damaged" else run.manifest()
    keys = [name for name in run.committed_files("metrics/") if name.endswith(".parquet")]
    blobs = [_read(run, key, _check_rows, corruptions) for key in keys]
    return RunRecord(
        name=run.name,
        kind="" if state.kind == "?" else state.kind,
        spec_text=_read(run, "spec.yaml", _decode, corruptions) or "",
        environment=_read(run, "environment.json", _json, corruptions) or {},
        result=_result(run, state.kind, result_classes, corruptions),
        rows=read_rows(filter(None, blobs)),
        events=run.events() + [{"event": "damaged", "what": str(damage)} for damage in corruptions],
        status=state.status,
        error=manifest.error if manifest else None,
        corruptions=[str(damage) for damage in corruptions],
    )


def _read(run: Run, relative: str, parse: Callable[[bytes], T], corruptions: list[IntegrityError]) -> T | None:
    """A parsed file of the run. None for a missing file, and for a damaged one, which is added to `corruptions`."""
    try:
        return parse(run.read(relative))
    except FileNotFoundError:
        return None
    except (IntegrityError, ValueError) as error:
        file = f"{run.url}/{relative}"
        corruptions.append(IntegrityError(str(error) if str(error).startswith(file) else f"{file} is damaged: {error}"))
        return None


def _result(
    run: Run, kind: str, result_classes: Mapping[str, type[RunResult]], corruptions: list[IntegrityError]
) -> RunResult | None:
    """The result of a run, or None where there is none or, which adds to `corruptions`, a damaged one."""
    try:
        if kind == "?":  # the manifest is missing or damaged
            kind = kind_of_result(run) or "?"
        return read_result(run, result_classes[kind]) if kind in result_classes else None
    except IntegrityError as error:
        corruptions.append(error)
        return None


def _check_rows(blob: bytes) -> bytes:
    """The same bytes. ValueError or IntegrityError where they hold no rows."""
    read_rows([blob])
    return blob


def _decode(blob: bytes) -> str:
    return blob.decode(errors="replace")


def _json(blob: bytes) -> dict[str, Any]:
    values = json.loads(blob)
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    return values
