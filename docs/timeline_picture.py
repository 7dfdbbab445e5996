"""Draws a stretch of a timeline, from one time in milliseconds to another: how docs/timeline.png and, of what
tests/benchmarks/run_overlap leaves, docs/overlap.png were made.

python docs/timeline_picture.py TIMELINE.json FROM TO PICTURE.png
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"NEGOTIATE": "#e0b050", "QUEUE": "#c8c8c8", "MEMCPY": "#7aa874", "backward": "#b07aa1"}
OPERATION, TRANSFER = "#d8e2f0", "#4c78a8"


def colour(name: str) -> str:
    other = TRANSFER if "_" in name else OPERATION
    return next((one for start, one in COLOURS.items() if name.startswith(start)), other)


def main(path: str, begin: float, end: float, picture: str) -> None:
    lanes: dict[int, str] = {}
    begun: dict[tuple[int, int], list[tuple[str, float]]] = defaultdict(list)
    bars, ticks = [], []
    for event in json.loads(Path(path).read_text()):
        time = event.get("ts", 0) / 1000
        place = event["pid"], event.get("tid", 0)
        if event.get("name") == "process_name":
            lanes[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "B":
            begun[place].append((event["name"], time))
        elif event["ph"] == "E":
            name, since = begun[place].pop()
            if since < end and time > begin:
                bars.append((event["pid"], name, since, time, len(begun[place])))
        elif event["ph"] == "X" and begin < time < end:
            ticks.append((event["pid"], event["name"], time))
    ticks = [tick for tick in ticks if tick[0] in {bar[0] for bar in bars}]
    transfers = sorted({bar[1] for bar in bars if colour(bar[1]) == TRANSFER})
    rows = {pid: row for row, pid in enumerate(sorted({bar[0] for bar in bars}, reverse=True))}
    figure, axes = plt.subplots(figsize=(11, 0.6 + 0.55 * len(rows)))
    for pid, name, since, until, depth in sorted(bars, key=lambda bar: bar[4]):
        height = 0.8 if depth == 0 else 0.5
        axes.barh(rows[pid], until - since, height, left=since, color=colour(name), edgecolor="white", linewidth=0.4)
    for pid, rank, time in ticks:
        axes.text(time, rows[pid], rank, fontsize=7, ha="center", va="center")
    axes.set_yticks(list(rows.values()), [lanes[pid] for pid in rows], fontsize=8)
    axes.set_xlim(begin, end)
    axes.set_xlabel("milliseconds")
    legend = {"NEGOTIATE": COLOURS["NEGOTIATE"], "QUEUE": COLOURS["QUEUE"], "MEMCPY_IN, _OUT": COLOURS["MEMCPY"]}
    legend |= {"ALLREDUCE": OPERATION, ", ".join(transfers): TRANSFER}
    handles = [plt.Rectangle((0, 0), 1, 1, color=one) for one in legend.values()]
    axes.legend(handles, list(legend), fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
