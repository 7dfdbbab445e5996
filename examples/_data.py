"""The data of the examples: the images of Fashion-MNIST, and text that every Debian has."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import torch

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
LICENCES = Path("/usr/share/common-licenses")


def read_idx(folder: Path, name: str) -> torch.Tensor:
    """One IDX file: two zero bytes, the type (8: bytes), the number of dimensions, each dimension, the values."""
    for path, opened in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.exists():
            with opened(path, "rb") as file:
                data = file.read()
            break
    else:
        sys.exit(f"{folder} has no {name}[.gz]; install dataset-fashion-mnist or name another folder with --data")
    dimensions = data[3]
    if data[:3] != b"\0\0\x08":
        sys.exit(f"{path} is not an IDX file of bytes")
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * dimensions).reshape(shape)


class Images:
    """Images and labels of one part of the data set, "train" or "t10k", all in memory."""

    def __init__(self, folder: Path, part: str) -> None:
        self.images = read_idx(folder, f"{part}-images-idx3-ubyte").unsqueeze(1)
        self.labels = read_idx(folder, f"{part}-labels-idx1-ubyte").long()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.images[indices].float() - 73.0) / 90.0, self.labels[indices]  # mean and deviation of the pixels


def read_text(path: Path) -> str:
    """A text file, or all files of a folder, in the order of their names; links are left out."""
    files = sorted(file for file in path.glob("*") if file.is_file() and not file.is_symlink())
    if path.is_file():
        files = [path]
    if not files:
        sys.exit(f"{path} is neither a file nor a folder with files; name a text with --text")
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
