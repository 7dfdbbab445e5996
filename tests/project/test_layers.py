"""Includes go one way, and each foreign library has one door (docs/ARCHITECTURE.md, "Rooms")."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', re.MULTILINE)

# What a room may include of this project, besides itself and the public headers. The longest matching room counts.
ROOMS: dict[str, tuple[str, ...]] = {
    "horovod_cpp/include": (),
    "common": (),
    "ops/reduce": ("common",),
    "ops/transport": ("common",),
    "ops/transport/inproc": ("common", "ops/transport"),
    "ops/transport/shm": ("common", "ops/transport"),
    "ops/transport/tcp": ("common", "ops/transport"),
    "ops/transport/mpi": ("common", "ops/transport"),
    "ops/transport/connect": ("common", "ops/transport", "ops/transport/shm", "ops/transport/tcp", "ops/transport/mpi"),
    "ops/device": ("common",),
    "ops/device/cuda": ("common", "ops/device"),
    "ops/algorithms": ("common", "ops", "ops/transport", "ops/reduce"),
    "ops/nccl": ("common", "ops", "ops/device", "ops/reduce"),
    "ops": ("common", "ops/algorithms", "ops/device", "ops/reduce", "ops/transport"),
    "horovod_cpp/engine": (
        "common",
        "ops",
        "ops/algorithms",
        "ops/device",
        "ops/nccl",
        "ops/reduce",
        "ops/transport",
    ),
    "horovod_cpp/engine/session": ("common", "horovod_cpp/engine", "ops", "ops/transport", "ops/transport/connect"),
    "horovod_cpp/engine/c_api": ("common", "horovod_cpp/engine", "horovod_cpp/engine/session", "ops/device"),
    "horovod_cpp/engine/c_api_builds": (
        "horovod_cpp/engine/c_api",
        "ops/device",
        "ops/nccl",
        "ops/transport/mpi",
    ),
    "horovod_cpp/bindings": (),
    "torch": (),
}

# Public headers for programs that have LibTorch.
WITH_LIBTORCH = ("horovod_cpp/include/horovod_cpp/torch.h", "horovod_cpp/include/horovod_cpp/torch/")

# Headers of other projects, and the only places that may name them.
DOORS: dict[str, str | tuple[str, ...]] = {
    r"mpi\.h": "ops/transport/mpi/",
    r"spdlog/.*": "common/log",
    r"hwy/.*": "ops/reduce/",
    r"zlib\.h": "ops/transport/frame",
    r"pybind11/.*": "horovod_cpp/bindings/",
    r"(torch|ATen|c10)/.*": ("torch/", *WITH_LIBTORCH),
    r"(cuda|nccl).*": "ops/device/cuda/",
}


def product_files() -> list[str]:
    files = [
        str(path.relative_to(ROOT))
        for folder in ("common", "ops", "horovod_cpp", "torch")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".h", ".cc", ".cu")
    ]
    assert len(files) > 100
    return sorted(files)


def room_of(file: str) -> str:
    """The longest room whose name begins `file`; a room may be a folder or one pair of files."""
    stem = file.rsplit(".", 1)[0]
    rooms = [room for room in ROOMS if stem == room or stem.startswith((room + "/", room + "_"))]
    assert rooms, f"{file} lies in no room"
    return max(rooms, key=len)


def includes(file: str) -> list[tuple[str, str]]:
    return [(quote, name) for quote, name in INCLUDE.findall((ROOT / file).read_text())]


@pytest.mark.parametrize("file", product_files())
def test_includes_go_one_way(file: str) -> None:
    room = room_of(file)
    for quote, name in includes(file):
        if quote == "<":
            continue  # a public header, or another project's
        assert (ROOT / name).is_file(), f'{file} includes "{name}", which is not named from the root'
        other = room_of(name)
        assert other == room or other in ROOMS[room], f"{file} ({room}) must not include {name} ({other})"


@pytest.mark.parametrize("file", product_files())
def test_foreign_headers_have_one_door(file: str) -> None:
    for quote, name in includes(file):
        for pattern, door in DOORS.items():
            if quote == "<" and re.fullmatch(pattern, name):
                assert file.startswith(door), f"{file} includes <{name}>; its only door is {door}"


def test_the_environment_is_read_in_one_place() -> None:
    users = [file for file in product_files() if re.search(r"\bgetenv\(", (ROOT / file).read_text())]
    assert users == ["common/env_options.cc"]


def test_public_headers_need_nothing_else() -> None:
    for file in product_files():
        if not file.startswith("horovod_cpp/include/"):
            continue
        for quote, name in includes(file):
            assert quote == "<", f"{file} includes its neighbour with quotes"
            allowed = name.startswith("horovod_cpp/") or "/" not in name or file.startswith(WITH_LIBTORCH)
            assert allowed, f"{file} includes <{name}>"


def test_nothing_hides_pytorch() -> None:
    assert not (ROOT / "torch" / "__init__.py").exists()
    assert not (ROOT / "tests" / "torch" / "__init__.py").exists()
