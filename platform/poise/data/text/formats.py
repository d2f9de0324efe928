"""Advice for text files in the formats of other trainers, which are recognized by the fields of their rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["JSON_LINES", "format_advice", "list_advice", "peek"]

_GUIDE = "docs/specs.md, Text of other trainers, has the lines of Python that do it"
JSON_LINES = 'rows {"prompt": ..., "completion": ...}, one JSON object a line, in a file *.jsonl'
_PEEK_BYTES = 1 << 20


def format_advice(values: Mapping[str, Any]) -> str | None:
    """The name of the format that a row is in, and how to convert it; None for a row of no known format."""
    fields = set(values)
    if {"instruction", "output"} <= fields:
        advice = "join instruction and input into the prompt"
        if not values.get("input"):
            advice = "set prompt: instruction and completion: output where no row has an input; else join the two"
        return f"these are alpaca rows (instruction, input, output): {advice}; {_GUIDE}"
    for key, name in (("messages", "chat messages (role, content)"), ("conversations", "ShareGPT turns (from, value)")):
        if isinstance(values.get(key), list) and not {"chosen", "rejected"} <= fields:
            return (
                f"these are {name}: write what comes before an answer as prompt and the answer as completion; {_GUIDE}"
            )
    if {"chosen", "rejected"} <= fields:
        return (
            "these are preference pairs (chosen, rejected), and nothing here is trained on pairs: finetune.sft can "
            f"learn the chosen answers as completions; {_GUIDE}"
        )
    if {"question", "answer"} <= fields:
        if isinstance(values["answer"], str):
            return "these are questions: set prompt: question and completion: answer"
        return "these are questions with lists of answers, as calibrate.measure reads them under `questions`"
    if fields == {"text"} or ("text" in fields and not fields & {"prompt", "completion"}):
        return f"this is plain text (text): write it as completion with an empty prompt; {_GUIDE}"
    return None


def list_advice(values: Mapping[str, Any]) -> str | None:
    """As `format_advice`, for a row of a file that is not JSON lines: the advice begins with writing JSON lines."""
    advice = format_advice(values)
    return f"write them as JSON lines, one row a line, in a file named *.jsonl; {advice}" if advice else None


def peek(path: Path) -> dict[str, Any] | None:
    """The first row of a local file that has another suffix than *.jsonl: of a JSON list or of compressed JSON lines.

    None where the file holds neither. Reads at most 1 MiB.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            head = file.read(_PEEK_BYTES).decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n")
    except (OSError, EOFError):
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(head.removeprefix("[").lstrip())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
