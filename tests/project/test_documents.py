"""Programs that a page shows are those that the tests compile."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = re.compile(r"<!-- (\S+) -->\n```\w+\n(.*?)```\n", re.DOTALL)


def test_programs_in_pages_are_the_files_that_they_name() -> None:
    shown = [entry for page in (ROOT / "docs").glob("*.md") for entry in SHOWN.findall(page.read_text())]
    assert shown
    for file, text in shown:
        assert (ROOT / file).read_text() == text, f"a page shows another {file}"
