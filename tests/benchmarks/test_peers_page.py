"""The page on Qwix and AQT says what they do: its code runs, each failure and what avoids it."""

import doctest
import importlib.metadata
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/peers.md"


def test_the_code_of_the_page_does_what_it_says() -> None:
    wrong: list[str] = []
    name = PAGE.name
    page = doctest.DocTestParser().get_doctest(PAGE.read_text("utf-8"), {}, name, str(PAGE), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(page, out=wrong.append)
    versions = {name: importlib.metadata.version(name) for name in ("qwix", "aqtp", "jax")}
    assert not wrong, (
        f"With {versions} a library does something else than docs/peers.md says. If a newer "
        f"release mends a failure: how good. Take it off the page, and make the tables anew.\n"
        f"{''.join(wrong)}"
    )


def test_the_page_names_the_versions_it_was_tried_with() -> None:
    # Outside of tables, whose captions name those of the measurements.
    text = re.sub(
        r"<!-- benchmark: .*?<!-- /benchmark -->", "", PAGE.read_text("utf-8"), flags=re.S
    )
    for name in ("qwix", "aqtp"):
        assert re.search(rf"\b{re.escape(importlib.metadata.version(name))}\b", text), (
            f"docs/peers.md was tried with another {name}: run its test, then name this one"
        )
