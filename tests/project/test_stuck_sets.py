"""Every test that adds a process set also runs while another set is stuck, or says here why not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PARALLEL = Path(__file__).resolve().parents[1] / "python" / "parallel"
STUCK = {"alone_and_beside_a_stuck_set", "operations_stuck_in"}
WITHOUT = {
    "test_process_sets_cannot_be_added_without_the_variable": "no set is added",
    "test_a_variable_that_is_set_after_the_import_lets_process_sets_be_added": "nothing runs in the set",
    "test_join_in_another_set_goes_on_while_one_is_stuck": "is beside one that joined ranks set free",
    "test_a_set_that_is_added_or_removed_beside_joined_ranks_is_an_error": "joined ranks would set it free",
}


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def words_of(node: ast.AST) -> Iterator[str]:
    """The names, parameters and texts in it; fixtures are any of these."""
    for part in ast.walk(node):
        match part:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.Constant(value=str(word)):
                yield word


def reached_from(words: set[str], functions: dict[str, ast.FunctionDef]) -> set[str]:
    """These words, and those in the helpers and fixtures among them, and so on."""
    reached: set[str] = set()
    while words:
        reached |= words
        inner = [words_of(functions[word]) for word in words if word in functions and word not in STUCK]
        words = {word for each in inner for word in each} - reached
    return reached


def test_process_sets_are_tested_beside_a_stuck_one() -> None:
    shared = functions_of(PARALLEL / "conftest.py")
    without = set()
    for path in PARALLEL.glob("test_*.py"):
        functions = shared | functions_of(path)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = [set(words_of(node)) for node in tree.body if isinstance(node, ast.Assign)]
        of_module: set[str] = set().union(*(words for words in assigned if "pytestmark" in words))
        for name in functions:
            words = reached_from({name} | of_module, functions)
            if name.startswith("test_") and "add_process_set" in words and not STUCK & words:
                without.add(name)
    assert without == set(WITHOUT)
