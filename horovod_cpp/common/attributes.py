"""What ranks have to bring alike where the library cannot compare it: it travels with the data, as bytes.

Ranks in C++ read and write the same bytes (torch/attributes.cc); the texts are those of the library's own mismatches.
Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from horovod_cpp.common.call_site import CallSite

_END = "\n"
_BETWEEN = "\t"


def encode(attributes: Mapping[str, str], site: CallSite) -> bytes:
    """The values of the attributes and the place of the call, one line. All ranks give the attributes in one order."""
    file, line = site
    fields = [*attributes.values(), "" if file is None else f"{file}:{line}"]
    return (_BETWEEN.join(" ".join(field.split()) for field in fields) + _END).encode()


def disagreements(names: Sequence[str], gathered: bytes, ranks: Sequence[int]) -> str:
    """What differs in the lines of all `ranks`, one behind the other: "mismatched op: Sum: rank 0; ..."; or nothing.

    Also says so where the bytes are no such lines.
    """
    lines = gathered.decode(errors="replace").split(_END)[:-1]
    rows = [line.split(_BETWEEN) for line in lines]
    if len(rows) != len(ranks) or any(len(row) != len(names) + 1 for row in rows):
        return "a rank has another operation by this name"
    if all(line == lines[0] for line in lines[1:]):
        return ""
    texts = []
    for column, name in enumerate(names):
        said: dict[str, tuple[list[int], set[str]]] = {}
        for rank, row in zip(ranks, rows, strict=True):
            who, sites = said.setdefault(row[column], ([], set()))
            who.append(rank)
            sites.add(row[-1])
        if len(said) > 1:
            values = (f"{value}: {rank_text(who)}{_place_text(sites)}" for value, (who, sites) in said.items())
            texts.append(f"mismatched {name}: {'; '.join(values)}")
    return "; ".join(texts)


def rank_text(ranks: Sequence[int]) -> str:
    """Ascending ranks as people write them: "rank 3", "ranks 0-2,4-7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _place_text(sites: set[str]) -> str:
    known = ", ".join(sorted(site for site in sites if site))
    return f" ({known})" if known else ""
