"""Append-only files of lines: the events of a run and the records of its results.

In a folder, lines are appended to a file, such as `events.jsonl`. S3 can only replace whole objects: n appends to one
object would write O(n^2) bytes. There each append creates a small object below `events/`, a segment, whose name has the
numbers of the first and of the last append that it holds:

    events/00000001-00000016.jsonl    events/00000017-00000017.jsonl    events/00000018-00000018.jsonl

The content is that of the file, if there is one, followed by the segments in the order of their numbers. A segment is
created by a conditional write, so that no two writers have the same number, and never changes. When the last FAN_OUT
segments hold equally many appends they are merged into one, and at the end of a run all are: n appends write
O(n log n) bytes and leave O(log n) objects.

Invariant, also after a crash at any point: a merged segment is written before those that it replaces are deleted, and a
segment whose numbers lie within those of another is ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from poise.errors import StoreError
from poise.store.records import FileRecord, record_of
from poise.store.storage import Storage

__all__ = ["FAN_OUT", "AppendedLines"]

FAN_OUT = 16
_RACES = 20  # number of times after which an operation that another process interferes with gives up
_SEGMENT = re.compile(r"(\d{8,12})-(\d{8,12})\.jsonl")


@dataclass(frozen=True)
class _Segment:
    """The numbers of the first and of the last append of one object."""

    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.first:08d}-{self.last:08d}.jsonl"

    @property
    def num_appends(self) -> int:
        return self.last - self.first + 1

    def contains(self, other: _Segment) -> bool:
        return self.first <= other.first and other.last <= self.last


class AppendedLines:
    """The append-only lines at `key`, which ends with `.jsonl`. A caller that appends holds the lease of the run."""

    def __init__(self, storage: Storage, key: str) -> None:
        self.storage = storage
        self.key = key
        self._ends_with_newline = False  # not known before the first append
        self._segments: list[_Segment] = []  # when they were last listed, in order
        self._ignored: list[_Segment] = []  # those whose numbers lie within another segment
        self._contents: dict[_Segment, bytes] = {}  # of segments that were read or written here

    def read(self) -> bytes:
        """All bytes, also a line that a crash left incomplete; empty if there are none. Every byte is read now."""
        self._contents.clear()
        return self.known()

    def known(self) -> bytes:
        """As `read`, but does not read a segment again that this object has read or written: segments never change."""
        for _ in range(_RACES):
            has_file = self._list()
            try:
                parts = [self._content(segment) for segment in self._segments]
            except FileNotFoundError:
                continue  # another process has merged segments after they were listed
            return b"".join([self.storage.read(self.key) if has_file else b"", *parts])
        raise StoreError(f"{self.storage.url}/{self.key}: changed {_RACES} times while it was read: run again")

    def record(self) -> FileRecord:
        """The size and the hash of the content as it is now."""
        return record_of(self.known())

    def append(self, values: Iterable[Mapping[str, Any]]) -> None:
        """Append one line of JSON for each of `values`."""
        lines = "".join(json.dumps(value, separators=(",", ":")) + "\n" for value in values)
        if not lines:
            return
        if not self._ends_with_newline and (text := self.known()) and not text.endswith(b"\n"):
            lines = "\n" + lines  # end the incomplete line of a driver that died
        self._ends_with_newline = False
        # A store that was copied from S3 into a folder has segments: lines in the file would come before them.
        if self._segments or not self.storage.append(self.key, lines.encode()):
            self._append_segment(lines.encode())
        self._ends_with_newline = True

    def merge_all(self) -> None:
        """Merge all segments into one; does nothing in a folder. The caller holds the lease of the run."""
        self._list()
        if len(self._segments) > 1 or self._ignored:
            self._merge(self._segments)

    def _append_segment(self, data: bytes) -> None:
        """Create a segment after the last one, then merge segments if that is due."""
        for _ in range(_RACES):
            number = self._segments[-1].last + 1 if self._segments else 1
            segment = _Segment(number, number)
            created = self.storage.create(self._key(segment), data)
            self._list()
            # The list before may have been old: then the number was free only because its segment had been merged.
            if created and segment in self._segments:
                self._contents[segment] = data
                self._merge_equal()
                return
        raise StoreError(f"{self.storage.url}/{self.key}: other writers were faster {_RACES} times: run again")

    def _merge_equal(self) -> None:
        """While the last FAN_OUT segments hold equally many appends, merge them."""
        while len(self._segments) >= FAN_OUT:
            newest = self._segments[-FAN_OUT:]
            if len({segment.num_appends for segment in newest}) > 1 or not self._merge(newest):
                return

    def _merge(self, segments: list[_Segment]) -> bool:
        """Replace neighbouring segments by one, and delete all that lie within it; False if another process did it."""
        try:
            data = b"".join(map(self._content, segments))
        except FileNotFoundError:  # another process has merged them
            self._list()
            return False
        merged = _Segment(segments[0].first, segments[-1].last)
        self.storage.write(self._key(merged), data)
        replaced = [each for each in (*self._segments, *self._ignored) if merged.contains(each) and each != merged]
        self.storage.delete([self._key(segment) for segment in replaced])
        self._list()
        self._contents = {each: self._contents[each] for each in self._segments if each in self._contents}
        self._contents[merged] = data
        return True

    def _list(self) -> bool:
        """List the segments; returns whether there is a file at `key` too."""
        prefix = self.key.removesuffix(".jsonl")
        keys = {entry.key for entry in self.storage.list(prefix)}
        present = []
        for key in keys:
            match = _SEGMENT.fullmatch(key.removeprefix(f"{prefix}/"))
            if match and key.startswith(f"{prefix}/"):
                present.append(_Segment(int(match[1]), int(match[2])))
        # In the order of their first numbers, the longest first: a segment within another comes after it.
        present.sort(key=lambda segment: (segment.first, -segment.last))
        self._segments = []
        self._ignored = []
        for segment in present:
            is_within = bool(self._segments) and self._segments[-1].contains(segment)
            (self._ignored if is_within else self._segments).append(segment)
        return self.key in keys

    def _content(self, segment: _Segment) -> bytes:
        """The bytes of a segment; `FileNotFoundError` if it has been merged since it was listed."""
        if segment not in self._contents:
            self._contents[segment] = self.storage.read(self._key(segment))
        return self._contents[segment]

    def _key(self, segment: _Segment) -> str:
        return f"{self.key.removesuffix('.jsonl')}/{segment.name}"
