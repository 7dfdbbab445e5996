"""Takes the output of a rank apart into lines, tags them, and passes them on.

One thread; writing blocks as long as the reader of our own output is slow.
"""

from __future__ import annotations

import os
import re
import select

# A carriage return ends a line as well: progress bars use it alone.
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\n|\r(?!\n))")
_READ_BYTES = 65536


class LineTagger:
    """Cuts a stream into whole lines, each after the tag."""

    def __init__(self, tag: bytes) -> None:
        self._tag = tag
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The lines that `data` completes. A carriage return at its end waits for what follows."""
        data = self._rest + data
        tail = b"\r" if data.endswith(b"\r") else b""
        data = data[: len(data) - len(tail)]
        lines = _LINE.findall(data)
        self._rest = data[sum(map(len, lines)) :] + tail
        return b"".join(self._tag + line for line in lines)

    def finish(self) -> bytes:
        """What is left as a line, once no more comes."""
        rest, self._rest = self._rest, b""
        return self._tag + rest.rstrip(b"\r") + b"\n" if rest else b""


class RankStream:
    """One output stream of one rank: reads the pipe without blocking, writes tagged lines to `targets`."""

    def __init__(self, source: int, target: int, tag: bytes, raw_copy: int | None) -> None:
        """Own `source`, the reading end of a pipe, and `raw_copy`, a file for untagged bytes; write to `target`."""
        self.source = source
        self._target = target
        self._raw_copy = raw_copy
        self._tagger = LineTagger(tag) if tag else None
        self.closed = False
        os.set_blocking(source, False)

    def pump(self) -> bool:
        """Pass on a piece of what is there, if anything; closes at the end of the stream. True: call again."""
        if self.closed:
            return False
        try:
            data = os.read(self.source, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.close()
            return False
        if self._raw_copy is not None:
            write_all(self._raw_copy, data)
        write_all(self._target, self._tagger.feed(data) if self._tagger else data)
        return True

    def drain(self) -> None:
        """Pass on all that is there. For a rank that has ended, which can write no more."""
        while self.pump():
            pass

    def close(self) -> None:
        """Write what is left and close both ends."""
        if self.closed:
            return
        self.closed = True
        os.close(self.source)
        if self._raw_copy is not None:
            os.close(self._raw_copy)
        if self._tagger:
            write_all(self._target, self._tagger.finish())


def write_all(target: int, data: bytes) -> None:
    """Write everything. Blocks, also where the descriptor is set not to."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(target, rest) :]
        except BlockingIOError:
            select.select([], [target], [])
