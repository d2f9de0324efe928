"""The one rule by which sections of specs are laid over each other: `common`, profiles, sweeps and YAML's `<<`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["merge"]


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers merged in order, each over those before it. The layers themselves are not changed.

    Mappings are merged key by key, at every depth. Anything else replaces what was there: a number, a text, a list as a
    whole, and null, which is then the value of its key. Below the top, a mapping whose `name` is not that of the
    mapping before it replaces that one, whose other keys belong to the old name.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            if isinstance(value, dict):
                value = merge(old, value) if isinstance(old, dict) and _is_same_section(old, value) else merge(value)
            merged[key] = value
    return merged


def _is_same_section(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether `new` changes `old`, and is no section of another name."""
    return bool(new.get("name", old.get("name")) == old.get("name"))
