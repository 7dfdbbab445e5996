"""docs/migrating.md says what the code does: signatures of functions, names of variables."""

from __future__ import annotations

import ast
import inspect
import operator
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import horovod_cpp.torch as hvd
import horovod_cpp.torch.elastic  # noqa: F401 (makes it an attribute of hvd)
from horovod_cpp.common import knobs
from horovod_cpp.run.launcher import rank_variables

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "migrating.md").read_text()
CODE = re.compile(r"`([^`]+)`")
REQUIRED = inspect.Parameter.empty


class Parameter(NamedTuple):
    name: str
    kind: Any
    default: Any


class Row(NamedTuple):
    """A function as the page has it."""

    name: str
    horovod: list[Parameter]
    here: str


def rows_below(head: str) -> list[list[str]]:
    """The cells of the one table that begins with this line."""
    assert PAGE.count(f"\n{head}\n") == 1, f"there has to be one table with the head {head!r}"
    lines = PAGE.split(f"\n{head}\n")[1].splitlines()
    assert re.fullmatch(r"\|(-+\|)+", lines[0])
    table = [line for line in lines[1 : [*lines, ""].index("")] if line]
    assert table and all(line.startswith("|") and line.endswith("|") for line in table)
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table]


def code(cell: str) -> str:
    match = CODE.fullmatch(cell)
    assert match is not None, f"{cell!r} is not a cell with code only"
    return match[1]


def parse(signature: str) -> tuple[str, list[Parameter]]:
    """Name and parameters of a text such as `name(a, b=1)`; defaults are values, by the names of `hvd`."""
    name = signature.partition("(")[0]
    definition = ast.parse(f"def f{signature[len(name) :]}: pass").body[0]
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    assert not (arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg)
    required = len(arguments.args) - len(arguments.defaults)
    defaults = [REQUIRED] * required + [eval(ast.unparse(node), vars(hvd)) for node in arguments.defaults]
    parameters = [
        Parameter(argument.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default)
        for argument, default in zip(arguments.args, defaults, strict=True)
    ]
    if arguments.kwarg:
        parameters.append(Parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD, REQUIRED))
    return name, parameters


def function_rows() -> Iterator[Row]:
    for cells in rows_below("| Horovod | here | differences |"):
        assert len(cells) == 3, cells
        name, parameters = parse(code(cells[0]))
        yield Row(name, parameters, cells[1])


ROWS = list(function_rows())


def of_function(name: str) -> list[Parameter]:
    parameters = inspect.signature(operator.attrgetter(name)(hvd)).parameters.values()
    return [Parameter(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


def alike(left: Parameter, right: Parameter) -> bool:
    """Also the types: 0 is not False, and 1 not 1.0."""
    return left == right and type(left.default) is type(right.default)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_the_signature_is_that_of_the_table(row: Row) -> None:
    expected = list(row.horovod)
    if row.here != "same":
        assert row.here.startswith("adds "), f"{row.name}: 'same' or 'adds `parameter=default`', not {row.here!r}"
        expected += parse(f"added({code(row.here.removeprefix('adds '))})")[1]
    got = of_function(row.name)
    assert [parameter.name for parameter in got] == [parameter.name for parameter in expected]
    for one, other in zip(got, expected, strict=True):
        assert alike(one, other), f"{row.name}: {one} here, {other} in the table"


def test_everything_public_is_on_the_page() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    only_here = [code(cells[0]).partition("(")[0] for cells in rows_below("| name | for |")]
    assert not set(names) & set(only_here)
    assert set(only_here) <= set(hvd.__all__)
    callables = {name for name in hvd.__all__ if callable(getattr(hvd, name))}
    assert callables - {"Compression"} <= {*names, *only_here}


@pytest.mark.parametrize("cells", rows_below("| name | for |"), ids=lambda cells: cells[0])
def test_what_is_only_here_is_as_it_says(cells: list[str]) -> None:
    text = code(cells[0])
    name, parameters = parse(text) if "(" in text else (text, None)
    assert parameters is None or of_function(name) == parameters


NOT_YET = PAGE.split("\n## Not yet\n")[1].split("\n## ")[0]


def test_functions_that_are_not_yet_here() -> None:
    texts = [text for text in CODE.findall(NOT_YET) if re.fullmatch(r"\w+\(.*\)", text) and "=..." not in text]
    assert not [text for text in texts if hasattr(hvd, text.partition("(")[0])]


def test_the_variables_are_those_that_are_read() -> None:
    listed = [code(cells[0]) for cells in rows_below("| variable | here |")]
    read = re.findall(r'Row\{\{"(HOROVOD_\w+)"', (ROOT / "common" / "env_options.cc").read_text())
    assert len(read) > 10
    assert sorted(listed) == sorted(read)


def test_a_variable_that_is_not_read_is_not_in_the_table_of_knobs() -> None:
    knobs = (ROOT / "common" / "env_options.cc").read_text()
    for cells in rows_below("| variables | why |"):
        for name in re.findall(r"`(HOROVOD_[A-Z_]*[A-Z])`", cells[0]):
            assert f'"{name}"' not in knobs, name


UNREAD = sorted(name for cells in rows_below("| variables | why |") for name in CODE.findall(cells[0]))


def warned_of(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> list[str]:
    """Of which of these variables `init` would warn, were they all that is set."""
    monkeypatch.setattr(knobs, "_told", set(os.environ))
    for name, value in variables.items():
        knobs._told.discard(name)
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        knobs.warn_of_unread()
    return sorted(str(one.message).partition(" has no effect: ")[0] for one in caught)


def test_init_warns_of_what_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that the table has, and of nothing else."""
    assert sorted(knobs._WITHOUT_EFFECT) == UNREAD
    names = [name.replace("*", "_SOMETHING") for name in UNREAD]
    assert warned_of(monkeypatch, dict.fromkeys(names, "1")) == sorted(names)


def test_init_does_not_warn_of_what_is_read_or_off_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    read = [code(cells[0]) for cells in rows_below("| variable | here |")]
    read += ["HOROVOD_MPI_LIBRARY", "HOROVOD_NCCL_LIBRARY", "HOROVOD_ELASTIC", "HOROVOD_RANK", "HOROVOD_SIZE"]
    assert warned_of(monkeypatch, dict.fromkeys(read, "1")) == []
    off = ["HOROVOD_AUTOTUNE", "HOROVOD_HIERARCHICAL_ALLGATHER", "HOROVOD_ENABLE_XLA_OPS", "HOROVOD_TORUS_ALLREDUCE"]
    assert warned_of(monkeypatch, dict.fromkeys(off, "0")) == []
    assert warned_of(monkeypatch, {"HOROVOD_AUTOTUNE": "0", "HOROVOD_AUTOTUNE_LOG": "a", "HOROVOD_GPU": "0"}) == [
        "HOROVOD_AUTOTUNE_LOG",
        "HOROVOD_GPU",
    ]


@pytest.mark.parametrize(
    ("misspelt", "near"),
    [
        ("HOROVOD_FUSION_TRESHOLD", "HOROVOD_FUSION_THRESHOLD"),
        ("HOROVOD_STALL_CHECK_TIME", "HOROVOD_STALL_CHECK_TIME_SECONDS"),
        ("HOROVOD_LOGLEVEL", "HOROVOD_LOG_LEVEL"),
        ("HOROVOD_CACHE_CAPACITY_", "HOROVOD_CACHE_CAPACITY"),
        ("HOROVOD_XYZZY", None),
        ("HOROVOD_", None),
    ],
)
def test_init_warns_of_a_name_that_nothing_reads(
    monkeypatch: pytest.MonkeyPatch, misspelt: str, near: str | None
) -> None:
    monkeypatch.setattr(knobs, "_told", set(os.environ))
    monkeypatch.setenv(misspelt, "1")
    with pytest.warns(RuntimeWarning) as caught:
        knobs.warn_of_unread()
        knobs.warn_of_unread()
    similar = f"; {near} has a similar name" if near else ""
    assert [str(one.message) for one in caught] == [f"{misspelt} has no effect: nothing reads it{similar}"]


def test_init_does_not_warn_of_what_launchers_set(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {**rank_variables(0, 2, 1234, "token"), "HOROVOD_RENDEZVOUS_FD": "3"}
    others = ("OMPI_COMM_WORLD_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "NOT_HOROVOD_AT_ALL", "horovod_rank")
    assert warned_of(monkeypatch, launched | dict.fromkeys(others, "1")) == []


# ---- the parser of this file -----------------------------------------------------------------------------------------


def test_parameters_are_read_from_text() -> None:
    name, parameters = parse("f(a, b=None, c=Average, d=1.0, e=global_process_set, **kwargs)")
    assert name == "f"
    assert [(one.name, one.default) for one in parameters] == [
        ("a", REQUIRED), ("b", None), ("c", 0), ("d", 1.0), ("e", hvd.global_process_set), ("kwargs", REQUIRED),
    ]  # fmt: skip
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize(
    "wrong", ["f(b, a)", "f(a)", "f(a, b=False)", "f(a, b=0.0)", "f(a, b)", "f(a, c=0)", "f(a, b=0, c=None)"]
)
def test_differences_are_seen(wrong: str) -> None:
    def f(a: Any, b: Any = 0) -> None: ...

    got = [Parameter(one.name, one.kind, one.default) for one in inspect.signature(f).parameters.values()]
    other = parse(wrong)[1]
    assert len(got) != len(other) or not all(alike(one, two) for one, two in zip(got, other, strict=True))
