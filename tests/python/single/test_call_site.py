"""The place in the user's code that messages name."""

from __future__ import annotations

from horovod_cpp.common.call_site import call_site


def test_each_call_of_a_function_has_its_own_line() -> None:
    sites = [
        call_site(),
        call_site(),
    ]
    assert [file for file, _ in sites] == [__file__, __file__]
    assert sites[1][1] == sites[0][1] + 1


def test_one_place_is_the_same_each_time() -> None:
    assert len({call_site() for _ in range(3)}) == 1


def test_code_that_comes_and_goes() -> None:
    """New code may get the address of code that is gone; and there is more of it than is remembered."""
    for number in range(6000):
        code = compile("\n" * (number % 7) + "site = call_site()", f"made-{number}", "exec")
        names = {"call_site": call_site}
        exec(code, names)
        assert names["site"] == (f"made-{number}", number % 7 + 1)  # type: ignore[comparison-overlap]
