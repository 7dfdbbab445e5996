"""The names of environment variables: those that are read, those that are warned of, and those in the pages."""

from __future__ import annotations

import re
from pathlib import Path

from horovod_cpp.common import knobs

ROOT = Path(__file__).resolve().parents[2]
ROWS = set(re.findall(r'Row\{\{"HOROVOD_(\w+)"', (ROOT / "common" / "env_options.cc").read_text()))


def names_in_the_code() -> set[str]:
    """All that the library's code has as a text of its own, but for the lists themselves."""
    files = [
        path
        for folder in ("common", "ops", "horovod_cpp", "torch")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".h", ".cc", ".cu", ".py") and path != ROOT / "horovod_cpp" / "common" / "knobs.py"
    ]
    names = {name for file in files for name in re.findall(r'"HOROVOD_([A-Z_]+)"', file.read_text())}
    return names - {"VERSION"}  # a name of compat, not a variable


def test_init_knows_every_variable_that_is_read() -> None:
    """Or it would say of one that nothing reads it."""
    assert len(ROWS) > 20 and set(knobs._SETTINGS) >= ROWS
    assert {*knobs._SETTINGS, *knobs._OF_THE_LAUNCHER} == names_in_the_code() | {"ELASTIC"}  # which knobs.py reads


def test_no_name_is_both_read_and_without_effect() -> None:
    assert not {f"HOROVOD_{name}" for name in knobs._SETTINGS} & knobs._WITHOUT_EFFECT.keys()


def test_the_page_for_users_of_horovod_names_all_settings() -> None:
    page = (ROOT / "docs" / "migrating.md").read_text()
    # The folder of the modules is for tests.
    assert [name for name in knobs._SETTINGS if f"`HOROVOD_{name}" not in page] == ["MODULE_PATH"]


def test_the_readme_names_settings_that_there_are() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.split("\n## Settings\n")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| `HOROVOD_(\w+)` \|", table, re.MULTILINE)) > 5
    assert set(re.findall(r"`HOROVOD_(\w+)`", table)) <= ROWS
    assert "(docs/migrating.md#environment-variables)" in table
    assert set(re.findall(r"`HOROVOD_(\w+)`", text)) <= set(knobs._SETTINGS)
