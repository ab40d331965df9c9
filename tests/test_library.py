from __future__ import annotations

import errno
import itertools
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made import adapter, die, killed, lora_tensors, one_line, rich

from polytask.adapters import Adapter, Lineage, ScoreCard, save
from polytask.errors import PolytaskError
from polytask.library import Library, forgetting
from polytask.library.index import Index, unit
from polytask.library.tables import MIGRATIONS


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "lib")


def refusal(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(PolytaskError) as caught:
        call(*args, **kwargs)
    return one_line(caught.value)


def test_add_get_and_what_an_entry_says(library: Library) -> None:
    one = rich()
    assert library.add(one, tags=("mine", "béta")) == one.id
    back = library.get(one.id)
    assert back.id == one.id
    assert back.card == one.card
    entry = library.entry("tickets")
    assert (entry.id, entry.name, entry.version, entry.task, entry.kind) == (
        one.id,
        "tickets",
        1,
        "tickets",
        "classification",
    )
    assert (entry.method, entry.backbone, entry.fingerprint) == ("lora", "tiny", "f" * 64)
    assert (entry.metric, entry.score, entry.low, entry.high) == ("accuracy", 0.9, 0.85, 0.95)
    assert (entry.trained_parameters, entry.bytes, entry.tags, entry.removed) == (47, one.bytes, ("mine", "béta"), None)
    assert library.list() == (entry,)


def test_adding_again_changes_nothing_but_the_card(library: Library) -> None:
    one = rich()
    library.add(one, tags=("mine",))
    added = library.entry(one.id).added
    scores = {"test": ScoreCard(metric="accuracy", value=0.7, low=0.6, high=0.8, n=100)}
    library.add(replace(one, card=one.card.model_copy(update={"scores": scores})))
    entry = library.entry(one.id)
    assert (entry.version, entry.score, entry.tags, entry.added) == (1, 0.7, ("mine",), added)
    assert library.get("tickets").card.scores == scores
    other = replace(one, card=one.card.model_copy(update={"name": "other"}))
    assert "kept already as tickets" in refusal(library.add, other)
    assert library.get(one.id).name == "tickets"


def test_versions_of_a_name(library: Library) -> None:
    ids = [library.add(adapter(seed=seed)) for seed in range(3)]
    assert [e.version for e in library.list(name="tickets")] == [3, 2, 1]
    assert library.get("tickets").id == ids[2]
    assert library.get("tickets@1").id == ids[0]
    library.remove("tickets")
    assert library.get("tickets").id == ids[1]
    assert library.add(adapter(seed=9))
    assert library.entry("tickets").version == 4
    assert "no such adapter" in refusal(library.get, "tickets@7")


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "\0"])
def test_names_are_one_line(library: Library, name: str) -> None:
    assert "a name has" in refusal(library.add, adapter(name))


def test_references(library: Library) -> None:
    ids = sorted(library.add(adapter(f"n{seed}", seed=seed)) for seed in range(20))
    twins = next((a, b) for a, b in itertools.pairwise(ids) if a[:1] == b[:1])
    assert library.get(ids[0][:8]).id == ids[0]
    for strange in ("", "%", "zzz", "../..", "n1\n", ids[0] + "00", ids[0][:2], "'; DROP TABLE adapters; --"):
        assert "no such adapter" in refusal(library.get, strange)
    # a name that looks like the beginning of an id is a name
    library.add(adapter(twins[0][:5], seed=99))
    assert library.get(twins[0][:5]).id == adapter(seed=99).id


def test_an_ambiguous_beginning_lists_what_it_could_be(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ["abc1" + "0" * 12, "abc2" + "0" * 12]
    for number, identity in enumerate(ids):
        one = adapter(f"n{number}", seed=number)
        vars(one)["id"] = identity
        with library._index.write() as connection:
            library._index.put(connection, one, embedding=None, tags=None)
    said = refusal(library.get, "abc")
    assert all(identity in said for identity in ids)
    assert library.entry("abc2").id == ids[1]


def test_filters(library: Library) -> None:
    library.add(adapter("a", seed=1), tags=("x", "100%"))
    library.add(adapter("b", seed=2, method="ia3", task={"kind": "tagging", "name": "ner"}), tags=("xy",))
    assert [e.name for e in library.list(tag="x")] == ["a"]
    assert [e.name for e in library.list(tag="100%")] == ["a"]
    assert [e.name for e in library.list(kind="tagging", method="ia3", task="ner")] == ["b"]
    assert [e.name for e in library.list(limit=1)] == ["a"]
    assert library.list(fingerprint="0") == ()
    assert library.tag("b", "new").tags == ("new",)


def test_search_finds_by_what_a_task_is(library: Library) -> None:
    library.add(
        adapter("router", seed=1, task={"labels": [{"name": "billing", "description": "card charged twice"}]}),
    )
    library.add(
        adapter("mood", seed=2, task={"instruction": "Is the café review happy?"}, notes=("billing mentioned",))
    )
    library.add(adapter("日本語", seed=3, task={"instruction": "感情を分類する"}))
    assert [e.name for e in library.search("my card was charged")] == ["router"]
    assert [e.name for e in library.search("billing")] == ["router", "mood"]
    assert [e.name for e in library.search("REVIEWS cafe")] == ["mood"]
    assert [e.name for e in library.search("bill")] == ["router", "mood"]
    assert [e.name for e in library.search("分類")] == ["日本語"]
    assert len(library.search("billing", limit=1)) == 1
    library.remove("router")
    assert [e.name for e in library.search("billing")] == ["mood"]


@pytest.mark.parametrize(
    "text", ['"', "a AND", "NEAR(", "*", "name:", "^x", "(", "%", "_", "\\", "'", "", " ", "\0", "-x", "a" * 9999]
)
def test_odd_searches_find_nothing_quietly(library: Library, text: str) -> None:
    library.add(adapter("q", seed=1, task={"name": "q", "instruction": "zzz"}))
    assert library.search(text) == ()


def test_search_without_full_text(library: Library) -> None:
    library.add(adapter("router", seed=1, notes=("odd",)))
    library.add(adapter("odd", seed=2))
    library._index._full_text = False
    assert [e.name for e in library.search("Odd words")] == ["odd", "router"]
    assert library.search("%") == ()


def test_similar(library: Library) -> None:
    for seed, mean in enumerate(([1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 5.0])):
        tensors = lora_tensors(seed, layers=1, width=4, r=2) | {"task/mean": torch.tensor(mean)}
        library.add(adapter(f"n{seed}", tensors=tensors))
    library.add(adapter("given", seed=7), embedding=[-1.0, 0.0, 0.0])
    library.add(adapter("wide", seed=8), embedding=[1.0, 0.0, 0.0, 0.0])
    library.add(adapter("none", seed=9))
    found = library.similar(torch.tensor([3.0, 0, 0]), k=4)
    assert [(e.name, round(cosine, 6)) for e, cosine in found] == [
        ("n0", 1.0),
        ("n1", 0.6),
        ("n2", 0.0),
        ("given", -1.0),
    ]
    library.remove("n0")
    assert library.similar([1, 0, 0], 1)[0][0].name == "n1"
    assert library.similar([1, 0, 0], 1, fingerprint="other") == ()
    assert library.similar([1, 0], 1) == ()
    for bad in ([0, 0, 0], [], [[1, 2]], [float("nan"), 1]):
        assert "an embedding is one vector" in refusal(library.similar, bad)
    assert "an embedding" in refusal(library.add, adapter(seed=10), embedding=[0.0])
    assert unit([1e30, 0, 1e-30])[0] == 1.0


def test_trash_and_restore(library: Library) -> None:
    identity = library.add(rich(), tags=("mine",))
    assert library.remove("tickets") == identity
    assert library.list() == ()
    assert [e.id for e in library.list(removed=True)] == [identity]
    assert "in the trash" in refusal(library.get, "tickets")
    assert "no such adapter" in refusal(library.restore, "other")
    assert library.restore("tickets") == identity
    assert library.get("tickets").id == identity
    assert library.entry("tickets").tags == ("mine",)
    library.remove(identity)
    library.add(rich())  # adding it again takes it out of the trash
    assert library.get("tickets").id == identity
    assert not (library.location / "trash" / identity).exists()
    assert library.verify() == ()
    assert "no such adapter in the trash" in refusal(library.restore, identity)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_forget_leaves_nothing_but_a_line(library: Library) -> None:
    secret = adapter("xylophonist", seed=1, task={"instruction": "quixotic zebra"}, notes=("marmalade",))
    library.add(adapter("kept", seed=2))
    identity = library.add(secret, embedding=[1.0, 2.0], tags=("clandestine",))
    sha256 = json.loads((library.location / "adapters" / identity / "adapter.json").read_text())["sha256"]
    assert b"xylophonist" in everything(library.location)
    assert library.forget("xylophonist", reason="asked by its owner") == identity
    left = everything(library.location)
    for word in (b"xylophonist", b"quixotic", b"zebra", b"marmalade", b"clandestine"):
        assert word not in left
    assert "no such adapter" in refusal(library.get, identity)
    assert library.search("zebra") == ()
    assert len(library.similar([1, 2], 5)) == 0
    (line,) = library.forgotten()
    assert (line["id"], line["sha256"], line["reason"]) == (identity, sha256, "asked by its owner")
    assert [e.name for e in Library(library.location).list()] == ["kept"]
    # it may come back later, and be forgotten again, for a reason with an odd end of a line
    library.add(secret)
    library.remove(identity)
    library.forget(identity, reason="one\u2028two")
    assert [line["reason"] for line in library.forgotten()] == ["asked by its owner", "one\u2028two"]
    assert not any((library.location / "forgetting").iterdir())


def test_forget_while_another_process_has_the_index_open(library: Library) -> None:
    library.add(adapter("xylophonist", seed=1))
    other = sqlite3.connect(library.location / "library.sqlite")
    other.execute("SELECT count(*) FROM adapters").fetchone()
    library.forget("xylophonist")
    assert b"xylophonist" not in everything(library.location)
    other.close()


def test_forget_is_never_a_guess(library: Library) -> None:
    library.add(adapter(seed=1))
    library.add(adapter(seed=2))
    assert "tickets@2" in refusal(library.forget, "tickets")
    for strange in ("../adapters", "", ".", "nothing", "0" * 16):
        assert "no such adapter" in refusal(library.forget, strange)
    library.forget("tickets@1")
    assert [e.version for e in library.list()] == [2]


def test_lineage(library: Library) -> None:
    a, b = library.add(adapter("a", seed=1)), library.add(adapter("b", seed=2))
    c = library.add(adapter("c", seed=3, lineage=Lineage(parents=(a, b, "f" * 16, a))))
    relatives = library.lineage("c")
    assert ({e.id for e in relatives.parents}, relatives.children, relatives.missing) == ({a, b}, (), ("f" * 16,))
    assert [e.id for e in library.lineage("a").children] == [c]
    library.forget("a")
    assert library.lineage("c").missing == tuple(sorted((a, "f" * 16)))


def test_export_and_import(library: Library, tmp_path: Path) -> None:
    one = rich()
    library.add(one)
    folder = library.export("tickets", tmp_path / "out")
    other = Library(tmp_path / "other")
    assert other.import_(folder) == one.id
    assert other.get("tickets").card == one.card
    assert "sites=" in refusal(library.export, "tickets", tmp_path / "p", format="peft")
    assert "one of polytask, peft" in refusal(library.export, "tickets", tmp_path / "p", format="zip")
    assert "no adapter here" in refusal(other.import_, tmp_path)

    from test_adapters_peft import Place

    sites = {f"0.attn.{x}": Place(f"layer.0.{x}", "output", 4, 4) for x in "qv"}
    folder = library.export("tickets", tmp_path / "p", format="peft", sites=sites)
    library.forget("tickets")
    assert "sites=" in refusal(library.import_, folder)
    assert library.import_(folder, sites=sites, tags=("back",)) == one.id
    assert library.entry("tickets").tags == ("back",)


def test_verify_lists_what_is_damaged(library: Library) -> None:
    ids = [library.add(adapter(f"n{seed}", seed=seed)) for seed in range(5)]
    library.remove(ids[4])
    assert library.verify() == ()
    live = library.location / "adapters"
    (live / ids[0] / "adapter.safetensors").write_bytes(b"x")
    (live / ids[1]).rename(library.location / "elsewhere")
    (library.location / "trash" / ids[4] / "adapter.json").unlink()
    save(adapter(seed=50), live / ("0" * 16))
    damaged = {d.id: d for d in library.verify()}
    assert set(damaged) == {ids[0], ids[1], ids[4], "0" * 16}
    assert damaged[ids[1]].problem == "its folder is gone"
    assert damaged[ids[0]].name == "n0"
    assert "holds another adapter" in damaged["0" * 16].problem
    assert all("\n" not in d.problem for d in damaged.values())
    assert "not a safetensors file" in refusal(library.get, ids[0])
    assert "no adapter here" in refusal(library.get, ids[1])
    # adding a good copy again mends it, and the others were never touched
    library.add(adapter("n0", seed=0))
    library.add(adapter("n1", seed=1))
    assert {d.id for d in library.verify()} == {ids[4], "0" * 16}
    library.forget("0" * 16)
    library.forget(ids[4])
    assert Library(library.location).verify() == ()


# ----------------------------------------------------------------------------------------------------- opening, healing


def test_what_is_no_library(tmp_path: Path) -> None:
    assert "no library here" in refusal(Library, tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "photo.jpg").write_text("x")
    assert "holds photo.jpg" in refusal(Library, tmp_path)
    assert os.listdir(tmp_path) == ["photo.jpg"]
    assert "is a file" in refusal(Library, tmp_path / "photo.jpg")
    assert "no SQLAlchemy URL" in refusal(Library, tmp_path / "x", index="nonsense")


def test_newer_and_damaged_libraries(library: Library) -> None:
    library.add(adapter())
    where = library.location
    path = where / "format.json"
    for text, said in (
        ('{"format": "polytask-library", "version": 2}', "library version 2"),
        ('{"format": "x", "version": 1}', "not of a polytask library"),
        ("[]", "not of a polytask library"),
        ("{", "cannot be read"),
    ):
        path.write_text(text)
        assert said in refusal(Library, where)
    path.unlink()  # the folders and the index say enough
    assert len(Library(where).list()) == 1

    with library._index.write() as connection:
        connection.exec_driver_sql(f"UPDATE polytask_schema SET version = {len(MIGRATIONS) + 1}")
    assert f"index version {len(MIGRATIONS) + 1}" in refusal(Library, where)

    for suffix in ("-wal", "-shm"):
        (where / f"library.sqlite{suffix}").unlink(missing_ok=True)
    (where / "library.sqlite").write_bytes(b"no database, but long enough to be read as one" * 100)
    assert "builds a new index" in refusal(Library, where)
    (where / "library.sqlite").unlink()
    assert [e.name for e in Library(where).list()] == ["tickets"]


def test_a_lost_index_is_built_again(library: Library) -> None:
    ids = [library.add(replace(one, card=one.card.model_copy(update={"created": f"2026-01-0{n}"})))
           for n, one in enumerate((adapter(seed=3), adapter(seed=1), adapter(seed=2)), start=1)]  # fmt: skip
    library.remove(ids[1])
    tensors = lora_tensors(7, layers=1, width=4, r=2) | {"task/mean": torch.tensor([1.0, 0.0])}
    library.add(adapter("embedded", tensors=tensors))
    for path in library.location.glob("library.sqlite*"):
        path.unlink()
    again = Library(library.location)
    assert [(e.id, e.version) for e in again.list(name="tickets")] == [(ids[2], 3), (ids[0], 1)]
    assert [e.id for e in again.list(removed=True)] == [ids[1]]
    assert again.similar([1.0, 0.0])[0][0].name == "embedded"
    assert [e.name for e in again.search("embedded")] == ["embedded"]


def test_an_index_elsewhere(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'index.db'}"
    library = Library(tmp_path / "lib", index=url)
    identity = library.add(adapter())
    assert Library(tmp_path / "lib", index=url).get("tickets").id == identity
    assert not (tmp_path / "lib" / "library.sqlite").exists()


def test_a_full_disk_loses_nothing(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.add(adapter(seed=1))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in refusal(library.add, adapter(seed=2))
        assert "No space left" in refusal(library.remove, "tickets")
        assert "No space left" in refusal(library.forget, "tickets")
        assert "No space left" in refusal(Library, library.location.parent / "new")
    assert list((library.location.parent / "new").glob(".*")) == []
    assert [e.id for e in Library(library.location).list()] == [adapter(seed=1).id]
    assert library.verify() == ()
    library.add(adapter(seed=2))


def open_after_kill(library: Library, owner: Any, method: str, work: Callable[[], object]) -> Library:
    def dying() -> None:
        setattr(owner, method, die)
        work()

    killed(dying)
    return Library(library.location)


def test_killed_between_the_folder_and_its_row(library: Library) -> None:
    library.add(adapter(seed=1))
    again = open_after_kill(library, Index, "put", lambda: library.add(adapter(seed=2)))
    assert [e.id for e in again.list()] == [adapter(seed=2).id, adapter(seed=1).id]
    assert again.verify() == ()


def test_killed_in_the_middle_of_remove_and_restore(library: Library) -> None:
    identity = library.add(adapter(seed=1))
    again = open_after_kill(library, Index, "mark", lambda: library.remove("tickets"))
    assert [e.id for e in again.list(removed=True)] == [identity]
    again = open_after_kill(library, Index, "mark", lambda: library.restore("tickets"))
    assert [e.id for e in again.list()] == [identity]


@pytest.mark.parametrize(("owner", "method"), [(Index, "delete"), (Index, "flush"), (forgetting, "finish")])
def test_killed_in_the_middle_of_forget(library: Library, owner: Any, method: str) -> None:
    library.add(adapter("xylophonist", seed=1))
    again = open_after_kill(library, owner, method, lambda: library.forget("xylophonist", reason="asked"))
    assert again.list() == ()
    assert b"xylophonist" not in everything(library.location)
    assert [line["reason"] for line in again.forgotten()] == ["asked"]
    assert Library(library.location).list() == ()


ADDING = """
import sys
sys.path.insert(0, {tests!r})
from made import adapter
from polytask.library import Library
library = Library({location!r})
for n in range(10):
    library.add(adapter("shared" if n % 2 else "own{worker}", seed=100 * {worker} + n))
library.add(adapter("same", seed=12345))
"""


def test_four_processes_add_at_once(tmp_path: Path) -> None:
    location = tmp_path / "lib"  # which none of them finds there
    code = [ADDING.format(tests=str(Path(__file__).parent), location=str(location), worker=n) for n in range(4)]
    workers = [subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE) for text in code]
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said.decode()
    library = Library(location)
    assert len(library.list()) == 41
    assert sorted(e.version for e in library.list(name="shared")) == list(range(1, 21))
    assert len(library.list(name="same")) == 1
    assert library.verify() == ()


# ------------------------------------------------------------------------------------------------------------- the cost


def test_the_hundredth_loads_as_fast_as_the_first(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        ids = [library.add(adapter(f"n{seed}", seed=seed)) for seed in range(120)]

    def cost(some: list[str]) -> float:
        times = []
        for identity in some:
            start = time.process_time()
            library.get(identity)
            times.append(time.process_time() - start)
        return statistics.median(times)

    cost(ids[:10])
    first, last = cost(ids[:50]), cost(ids[-50:])
    assert last < 2 * first
    assert max(first, last) < 0.02


def test_import_is_light() -> None:
    heavy = "('transformers', 'sklearn', 'peft', 'scipy')"
    code = f"import sys, polytask.library; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert said.strip() == "[]"


def test_an_adapter_is_not_changed_by_being_kept(library: Library) -> None:
    one: Adapter = rich()
    before = {name: tensor.clone() for name, tensor in one.tensors.items()}
    library.add(one)
    assert all(torch.equal(before[name], one.tensors[name]) for name in before)
