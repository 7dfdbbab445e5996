"""The timeline: its file, and what it shows of operations. Rank 0 writes it; see docs/timeline.md."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import horovod_cpp.torch as hvd

Event = dict[str, Any]


@pytest.fixture
def folder() -> Iterator[Path]:
    """The same folder on all ranks."""
    made = tempfile.mkdtemp(prefix="hvd-timeline-") if hvd.rank() == 0 else None
    path = Path(hvd.broadcast_object(made, 0, name="folder"))
    yield path
    hvd.init()  # nothing, unless the test failed between shutdown and init
    hvd.stop_timeline()
    hvd.barrier()
    if made is not None:
        shutil.rmtree(made)


def start_again(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    hvd.barrier()
    hvd.shutdown()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hvd.init()


def lanes(events: list[Event]) -> dict[str, list[Event]]:
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    found: dict[str, list[Event]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] != "M":
            found[names[event["pid"]]].append(event)
    return found


def read(path: Path) -> dict[str, list[Event]]:
    """The events of each lane. All that this rank asked for has ended; another may have asked for more already."""
    events = json.loads(path.read_text())
    begun: dict[tuple[int, int], list[Event]] = {}
    for event in events:
        event.setdefault("name", "")
        if event["ph"] == "B":
            begun.setdefault((event["pid"], event["tid"]), []).append(event)
        elif event["ph"] == "E":
            assert begun[event["pid"], event["tid"]].pop()["ts"] <= event["ts"]
    assert all(event["name"].startswith("NEGOTIATE_") for open_events in begun.values() for event in open_events)
    return lanes(events)


def names(events: list[Event]) -> list[str]:
    return [event["name"] for event in events if event["ph"] == "B"]


def done(found: dict[str, list[Event]]) -> set[str]:
    """The lanes with something that this rank took part in."""
    return {lane for lane, events in found.items() if "QUEUE" in names(events)}


def ready(events: list[Event]) -> list[str]:
    return [event["name"] for event in events if event["ph"] == "X"]


def allreduce(name: str, elements: int = 3) -> None:
    hvd.allreduce(torch.ones(elements), op=hvd.Sum, name=name)


def test_one_file_of_rank_0(folder: Path) -> None:
    path = folder / "timeline.json"
    before = time.time()
    hvd.start_timeline(path)
    hvd.barrier()  # nobody asks before rank 0 listens
    for _ in range(2):
        allreduce("test_allreduce")
    hvd.stop_timeline()
    if hvd.rank() != 0:
        return
    text = path.read_text()
    # What Horovod's own test looks for.
    for word in ("allreduce.test_allreduce", "start_time_since_epoch_in_micros", "NEGOTIATE_ALLREDUCE", "ALLREDUCE"):
        assert word in text
    assert "CYCLE_START" not in text
    first = json.loads(text)[0]["args"]
    assert (first["rank"], first["size"]) == (0, hvd.size())
    assert before - 1 < first["start_time_since_epoch_in_micros"] / 1e6 < time.time() + 1
    events = read(path)["allreduce.test_allreduce"]
    once = ["NEGOTIATE_ALLREDUCE", "ALLREDUCE", "QUEUE"]
    moved = [] if hvd.size() == 1 else [names(events)[3]]
    assert all(name.endswith("_ALLREDUCE") for name in moved)
    assert names(events) == 2 * (once + moved)
    assert sorted(ready(events)) == sorted(2 * [str(rank) for rank in range(hvd.size())])
    operation = next(event for event in events if event["name"] == "ALLREDUCE")
    assert operation["args"] == {"dtype": "float32", "shape": "[3]", "bytes": 12}
    if moved:
        transfer = next(event for event in events if event["name"] == moved[0])
        assert transfer["args"] == {"algorithm": "recursive_doubling", "operations": 1, "bytes": 12}
    assert sorted(os.listdir(folder)) == ["timeline.json"]


def test_a_file_for_each_rank(folder: Path) -> None:
    hvd.start_timeline(folder / "of-{rank}.json", mark_cycles=True)
    allreduce("x")
    hvd.stop_timeline()
    found = read(folder / f"of-{hvd.rank()}.json")
    assert "NEGOTIATE_ALLREDUCE" in names(found["allreduce.x"])
    assert "CYCLE_START" in [event["name"] for event in found[f"rank {hvd.rank()} of {hvd.size()}"]]
    assert bool(ready(found["allreduce.x"])) == (hvd.rank() == 0), "rank 0 knows who was when ready"


def test_fused_tensors_have_a_lane_each_with_their_copies(folder: Path) -> None:
    hvd.start_timeline(folder / "{rank}")
    tensors = [torch.ones(n) for n in (100, 200, 300)]
    handles = [hvd.allreduce_async_(tensor, op=hvd.Sum, name=f"t{i}") for i, tensor in enumerate(tensors)]
    for handle in handles:
        hvd.synchronize(handle)
    hvd.grouped_allreduce([torch.ones(10), torch.ones(20)], op=hvd.Sum, name="group")
    hvd.stop_timeline()
    found = read(folder / str(hvd.rank()))
    for i, elements in enumerate((100, 200, 300)):
        operation = next(event for event in found[f"allreduce.t{i}"] if event["name"] == "ALLREDUCE")
        assert operation["args"]["bytes"] == 4 * elements
    events = found["allreduce.group"]
    assert names(events)[3] == "MEMCPY_IN_FUSION_BUFFER" and names(events)[-1] == "MEMCPY_OUT_FUSION_BUFFER"
    operation = next(event for event in events if event["name"] == "ALLREDUCE")
    assert operation["args"] == {"dtype": "float32", "shape": "[10]", "bytes": 120, "tensors": 2}


def test_every_operation_has_its_phases(folder: Path) -> None:
    size = hvd.size()
    hvd.start_timeline(folder / "{rank}")
    hvd.allgather(torch.ones(2, 3), name="g")
    hvd.broadcast(torch.ones(4), 0, name="b")
    hvd.reducescatter(torch.ones(size, 2), name="r", op=hvd.Sum)
    hvd.alltoall(torch.ones(size, 2), name="a")
    hvd.grouped_allgather([torch.ones(2), torch.ones(3)], name="gg")
    hvd.allreduce(torch.ones(5), op=hvd.Adasum, name="adasum")
    hvd.barrier()
    hvd.join()
    hvd.stop_timeline()
    found = read(folder / str(hvd.rank()))
    for lane, operation in {
        "allgather.g": "ALLGATHER", "broadcast.b": "BROADCAST", "reducescatter.r": "REDUCESCATTER",
        "alltoall.a": "ALLTOALL", "allgather.gg": "ALLGATHER", "allreduce.adasum": "ALLREDUCE",
        "barrier.noname": "BARRIER",
    }.items():  # fmt: skip
        begun = names(found[lane])
        assert begun[:3] == [f"NEGOTIATE_{operation}", operation, "QUEUE"], lane
        assert any(name.endswith(f"_{operation}") for name in begun[3:]), (lane, begun)
    assert names(found["join"]) == ["NEGOTIATE_JOIN", "JOIN", "QUEUE"]
    assert "MEMCPY_IN_FUSION_BUFFER" in names(found["allgather.gg"])


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_process_sets_are_named(folder: Path) -> None:
    last = hvd.add_process_set([hvd.size() - 1]) if hvd.size() > 1 else hvd.global_process_set
    hvd.start_timeline(folder / "{rank}")
    hvd.barrier()  # nobody asks before rank 0 listens
    if last.included():
        hvd.allreduce(torch.ones(2), op=hvd.Sum, name="x", process_set=last)
    hvd.barrier()
    hvd.stop_timeline()
    found = read(folder / str(hvd.rank()))
    if hvd.size() == 1:
        return
    lane = f"allreduce.x (process set {last.process_set_id})"
    if last.included():
        assert names(found[lane])[:2] == ["NEGOTIATE_ALLREDUCE", "ALLREDUCE"]
    elif hvd.rank() == 0:
        assert names(found[lane]) == ["NEGOTIATE_ALLREDUCE"], "rank 0 negotiates for all"
    else:
        assert lane not in found
    hvd.barrier()
    hvd.remove_process_set(last)


def test_an_error_is_shown(folder: Path) -> None:
    if hvd.size() == 1:
        pytest.skip("one rank agrees with itself")
    hvd.start_timeline(folder / "{rank}")
    with pytest.raises(hvd.HorovodInternalError):
        allreduce("wrong", 3 + hvd.rank())
    hvd.stop_timeline()
    events = read(folder / str(hvd.rank()))["allreduce.wrong"]
    assert names(events) == ["NEGOTIATE_ALLREDUCE"]
    assert "mismatched shape" in events[-1]["args"]["error"]


def test_two_files_and_the_same_again(folder: Path) -> None:
    hvd.stop_timeline()  # nothing to stop
    hvd.start_timeline(folder / "one", mark_cycles=True)
    allreduce("first")
    hvd.start_timeline(str(folder / "one"), mark_cycles=True)  # goes on
    allreduce("second")
    hvd.start_timeline(folder / "two")  # ends the first
    allreduce("third")
    hvd.stop_timeline()
    hvd.stop_timeline()
    allreduce("unseen")
    hvd.start_timeline(folder / "three")
    hvd.stop_timeline()
    if hvd.rank() != 0:
        return
    one, two, three = (read(folder / name) for name in ("one", "two", "three"))
    assert "CYCLE_START" in [event["name"] for event in one[f"rank 0 of {hvd.size()}"]]
    assert done(one) == {"allreduce.first", "allreduce.second"}
    assert done(two) == {"allreduce.third"}
    assert done(three) == set()


def test_a_file_that_cannot_be_written_is_an_error_at_once(folder: Path) -> None:
    for path, reason in {
        folder / "missing" / "file": "No such file or directory",
        folder: "Is a directory",
        Path("/dev/full"): "No space left on device",
    }.items():
        if hvd.rank() != 0:
            hvd.start_timeline(path)  # rank 0 writes
            continue
        with pytest.raises(ValueError) as caught:
            hvd.start_timeline(path)
        assert f"'{path}'" in str(caught.value) and reason in str(caught.value)
    with pytest.raises(ValueError, match="path"):
        hvd.start_timeline("")
    allreduce("still good")


def test_before_init_and_after_shutdown(folder: Path) -> None:
    is_writer = hvd.rank() == 0
    hvd.start_timeline(folder / "ended by shutdown")
    allreduce("x")
    hvd.barrier()
    hvd.shutdown()
    for call in (lambda: hvd.start_timeline(folder / "file"), hvd.stop_timeline):
        with pytest.raises(ValueError, match=r"^Horovod has not been initialized; use hvd\.init\(\)\.$"):
            call()
    if is_writer:
        assert "allreduce.x" in read(folder / "ended by shutdown")
    hvd.init()


def test_by_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "timeline.json"
    start_again(monkeypatch, HOROVOD_TIMELINE=str(path), HOROVOD_TIMELINE_MARK_CYCLES="1")
    allreduce("test_allreduce")
    if hvd.rank() == 0:
        # Horovod's test looks after 0.1 s, and the file is written every 0.05 s; the scheduler owes us neither.
        words = ("allreduce.test_allreduce", "NEGOTIATE_ALLREDUCE", '"ALLREDUCE"', "CYCLE_START")
        deadline = time.monotonic() + 30
        while not all(word in (text := path.read_text()) for word in words):
            assert time.monotonic() < deadline, text
            time.sleep(0.01)
        json.loads(text)  # whole, though it is still written
    hvd.barrier()
    monkeypatch.undo()
    start_again(monkeypatch)
    assert sorted(os.listdir(folder)) == ["timeline.json"]


def test_dynamic_starts_nothing_yet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    start_again(monkeypatch, HOROVOD_TIMELINE="DYNAMIC")
    allreduce("x")
    assert os.listdir(folder) == []
    hvd.barrier()
    hvd.start_timeline("later")
    hvd.stop_timeline()
    hvd.barrier()
    assert os.listdir(folder) == ["later"]
    hvd.barrier()
    monkeypatch.undo()
    start_again(monkeypatch)


def test_without_a_timeline_there_is_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    start_again(monkeypatch, HOROVOD_TIMELINE="", HOROVOD_TIMELINE_MARK_CYCLES="1")
    allreduce("x")
    hvd.barrier()
    assert os.listdir(folder) == []
    hvd.barrier()
    monkeypatch.undo()
    start_again(monkeypatch)


def test_a_job_starts_though_its_timeline_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "missing" / "file"
    start_again(monkeypatch, HOROVOD_TIMELINE=str(path))
    allreduce("x")
    told = capfd.readouterr().err
    assert (f"'{path}': No such file or directory" in told) == (hvd.rank() == 0)
    hvd.barrier()
    monkeypatch.undo()
    start_again(monkeypatch)
