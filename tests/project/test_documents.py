"""Programs that a page shows are those that the tests compile."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = re.compile(r"<!-- (\S+)(?: (\S+))? -->\n```\w+\n(.*?)```\n", re.DOTALL)


def difference(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=1000, lineterm="")
    return "".join(f"{line}\n" for line in list(lines)[3:])


def test_programs_in_pages_are_the_files_that_they_name() -> None:
    shown = [entry for page in (ROOT / "docs").glob("*.md") for entry in SHOWN.findall(page.read_text())]
    assert shown
    for file, changed, text in shown:
        expected = (ROOT / file).read_text()
        if changed:
            expected = difference(expected, (ROOT / changed).read_text())
        assert text == expected, f"a page shows another {file}"


def test_six_lines_make_a_cpp_program_run_on_many_ranks() -> None:
    folder = ROOT / "examples" / "cpp_fashion_mnist"
    changes = difference((folder / "single.cc").read_text(), (folder / "distributed.cc").read_text())
    assert sum(line.startswith("+") for line in changes.splitlines()) <= 6


def test_the_map_has_every_folder_of_tests() -> None:
    """Those that mirror the tree, and those that it names."""
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    entry = page.split("\ntests/ ")[1].split("\n```")[0]
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("*.*"))} | {"python"}
    for folder in folders:
        mirrors = any((ROOT / above / folder).is_dir() for above in (".", "horovod_cpp"))
        assert mirrors or re.search(rf"\b{folder}/", entry), folder
