"""The library that answers: five lines of Python, versions, and libraries that cannot answer."""

from dataclasses import replace
from pathlib import Path

import pytest

import polytask as pt

DEMO = Path(pt.__file__).parent / "demo"


@pytest.fixture(scope="module")
def base() -> pt.Backbone:
    return pt.load()


@pytest.fixture(scope="module")
def tickets(base: pt.Backbone) -> tuple[pt.Adapter, pt.Adapter]:
    """The same task learned twice, from all of its examples and from fewer."""
    task = pt.Task.read(DEMO / "tickets")
    return pt.adapt(base, task, "head"), pt.adapt(base, replace(task, train=task.train[:120]), "head")


def test_routes_among_newest_versions_only(
    tmp_path: Path, base: pt.Backbone, tickets: tuple[pt.Adapter, pt.Adapter]
) -> None:
    library = pt.Library(tmp_path)
    library.use(base)
    older, newer = (library.add(adapter) for adapter in tickets)
    asked = library.answer("my parcel never came", adapter="tickets@1")
    assert (asked.adapter, asked.routed) == (older, None)
    for _ in range(2):  # naming the older version does not make it a choice of the router
        routed = library.answer("my parcel never came")
        assert routed.adapter == newer
        assert routed.routed == pytest.approx(1.0)
    assert library.answer("my parcel never came", adapter="tickets").adapter == newer


def test_follows_the_library(tmp_path: Path, base: pt.Backbone, tickets: tuple[pt.Adapter, pt.Adapter]) -> None:
    library = pt.Library(tmp_path)
    library.use(base)
    older, newer = (library.add(adapter) for adapter in tickets)
    assert library.answer("where is my order?").adapter == newer
    library.remove("tickets@2")
    assert library.answer("where is my order?").adapter == older


def test_an_empty_library_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(pt.UsageError, match="is empty: add an adapter with `polytask adapt`"):
        pt.Library(tmp_path).answer("hello")


def test_many_inputs_at_once(tmp_path: Path, base: pt.Backbone, tickets: tuple[pt.Adapter, pt.Adapter]) -> None:
    library = pt.Library(tmp_path)
    library.use(base)
    library.add(tickets[0])
    texts = ["my parcel never came", "I was charged twice"]
    assert library.answer(texts) == [library.answer(text) for text in texts]
