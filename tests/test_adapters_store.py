from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import adapter, die, killed, lora_tensors, one_line, rich
from safetensors.torch import save_file

from polytask.adapters import Adapter, load, save
from polytask.adapters.adapter import content_digest
from polytask.errors import PolytaskError, UsageError


def same(a: Adapter, b: Adapter) -> bool:
    return (
        replace(a, tensors={}) == replace(b, tensors={})
        and set(a.tensors) == set(b.tensors)
        and all(a.tensors[n].dtype == b.tensors[n].dtype and torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    )


def refusal(folder: Path) -> str:
    with pytest.raises(PolytaskError) as caught:
        load(folder)
    return one_line(caught.value)


def edit(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "adapter.json"
    fields = json.loads(path.read_text())
    for where, value in change.items():
        at = fields
        *path_to, last = where.split(".")
        for step in path_to:
            at = at[step]
        at[last] = value
    path.write_text(json.dumps(fields))


def test_round_trip(tmp_path: Path) -> None:
    one = rich()
    assert save(one, tmp_path / "a") == tmp_path / "a"
    back = load(tmp_path / "a")
    assert same(one, back)
    assert back.id == one.id == json.loads((tmp_path / "a" / "adapter.json").read_text())["id"]
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert same(Adapter.load(one.save(tmp_path / "b")), one)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
    ),
    st.lists(st.integers(1, 5), max_size=3),
    st.integers(0, 2**31),
)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)))


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.dictionaries(st.from_regex(r"[a-z0-9.]{1,9}/[A-Za-z]{1,3}", fullmatch=True), TENSORS, max_size=6),
    hyperparameters=st.dictionaries(TEXTS, JSON_VALUES, max_size=4),
    note=TEXTS,
)
def test_any_adapter_survives_the_disk(
    tensors: dict[str, torch.Tensor], hyperparameters: dict[str, Any], note: str
) -> None:
    one = adapter(tensors=tensors, notes=(note,))
    one = replace(one, hyperparameters=hyperparameters)
    with tempfile.TemporaryDirectory() as folder:
        try:
            json.dumps(hyperparameters, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            with pytest.raises(PolytaskError):
                save(one, Path(folder, "a"))
            return
        save(one, Path(folder, "a"))
        back = load(Path(folder, "a"))
    assert same(one, back)
    assert content_digest(back) == content_digest(one)


def test_tensors_may_share_memory_or_be_views(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    one = adapter(
        tensors={"s/a": base, "s/b": base, "s/c": base[:, 1], "s/d": base[1:], "s/e": base.T.requires_grad_()}
    )
    back = load(save(one, tmp_path / "a"))
    assert same(one, back)
    assert not back.tensors["s/e"].requires_grad


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"s/a": torch.zeros(0, 3)}, "s/a is empty"),
        ({"nameless": torch.zeros(2)}, "not named <site>/<parameter>"),
        ({"s/a": torch.zeros(2, device="meta")}, "not a dense tensor"),
        ({"s/a": torch.eye(2).to_sparse()}, "not a dense tensor"),
    ],
)
def test_unusable_tensors_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(PolytaskError, match=said):
        save(adapter(tensors=tensors), tmp_path / "a")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}, Path("x")])
def test_hyperparameters_must_be_json(tmp_path: Path, value: object) -> None:
    with pytest.raises(PolytaskError, match="hyperparameter"):
        save(adapter(hyperparameters={"r": value}), tmp_path / "a")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "change",
    [
        {"hyperparameters.alpha": 999.0},
        {"hyperparameters.new": 1},
        {"method": "dora"},
        {"head.targets": ["b", "a", "c"]},
        {"head": None},
        {"backbone.fingerprint": "e" * 64},
        {"backbone.hidden_size": 32},
        {"id": "0" * 16},
        {"tensors": {}},
        {"sha256": "0" * 64},
    ],
)
def test_an_edit_of_what_is_computed_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = save(rich(), tmp_path / "a")
    edit(folder, change)
    assert "changed by hand" in refusal(folder)


def test_what_is_only_said_may_be_edited(tmp_path: Path) -> None:
    one = rich()
    folder = save(one, tmp_path / "a")
    edit(folder, {"card.name": "better", "card.notes": ["mine"], "card.task.instruction": "Sort."})
    back = load(folder)
    assert (back.name, back.card.notes, back.id) == ("better", ("mine",), one.id)


def test_a_false_id_with_a_matching_digest_is_refused(tmp_path: Path) -> None:
    from polytask.adapters.store import describe

    folder = save(rich(), tmp_path / "a")
    forged = describe(folder).model_copy(update={"id": "0" * 16})
    edit(folder, {"id": forged.id, "digest": forged.expected_digest()})
    assert "but the content's is" in refusal(folder)


def test_other_format_versions(tmp_path: Path) -> None:
    folder = save(rich(), tmp_path / "a")
    edit(folder, {"format_version": 4})
    assert "format version 4" in refusal(folder)
    edit(folder, {"something_new": {}})  # a newer format may have any fields: the version is what matters
    assert "install a newer one" in refusal(folder)


def test_wrong_json_says_where(tmp_path: Path) -> None:
    folder = save(rich(), tmp_path / "a")
    path = folder / "adapter.json"
    text = path.read_text()
    path.write_text(text.replace('"method"', "method", 1))
    assert "line 4" in refusal(folder)
    path.write_bytes(b"\xff\xfe\x00")
    assert "adapter.json" in refusal(folder)
    path.write_text(text[: len(text) // 2])
    assert "line" in refusal(folder)
    path.write_text(text)
    edit(folder, {"card.scores.test.n": "many"})
    assert "field card.scores.test.n" in refusal(folder)
    path.write_text("[]")
    refusal(folder)
    path.unlink()
    assert "no adapter here" in refusal(folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.abort, ())


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = save(rich(), tmp_path / "a")
    path = folder / "adapter.safetensors"
    zipped = io.BytesIO()
    torch.save({"x": Bomb()}, zipped)
    for data, said in ((zipped.getvalue(), "zip archive"), (pickle.dumps(Bomb()), "pickle"), (b"hello", "not a safe")):
        path.write_bytes(data)
        assert said in refusal(folder)


def test_damaged_tensors_are_described(tmp_path: Path) -> None:
    folder = save(rich(), tmp_path / "a")
    path = folder / "adapter.safetensors"
    good = path.read_bytes()

    path.write_bytes(good[:-5])
    assert f"truncated: {len(good) - 5} of {len(good)} bytes" in refusal(folder)
    path.write_bytes(good[:20])
    assert "truncated or damaged in its header" in refusal(folder)
    path.write_bytes(b"")
    assert "0 bytes" in refusal(folder)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "its SHA-256 is not the one" in refusal(folder)

    tensors = dict(rich().tensors)
    del tensors["head/b"]
    save_file(tensors, path)
    assert "misses head/b" in refusal(folder)
    save_file(tensors | {"head/b": torch.zeros(3), "head/c": torch.zeros(1)}, path)
    assert "has head/c too many" in refusal(folder)
    save_file(tensors | {"head/b": torch.zeros(4)}, path)
    assert "has head/b as 4, not 3" in refusal(folder)
    path.unlink()
    assert "is missing" in refusal(folder)
    path.write_bytes(good)
    load(folder)


# ---------------------------------------------------------------------------------------------- whole, or as it was


def test_replacing_and_not_replacing(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    save(adapter(seed=1), folder)
    save(adapter(seed=2), folder)
    assert load(folder).id == adapter(seed=2).id
    save(adapter("renamed", seed=2), folder)
    assert load(folder).name == "renamed"
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds thesis.txt"):
        save(adapter(seed=3), folder)
    assert (folder / "thesis.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="is a file"):
        save(adapter(), folder / "thesis.txt")
    (tmp_path / "empty").mkdir()
    save(adapter(), tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["a", "empty"]


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    folder = save(adapter(), tmp_path / "a")
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    folder = save(adapter(seed=1), tmp_path / "a")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for target in (folder, tmp_path / "new"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(PolytaskError, match="No space left") as caught:
                save(adapter(seed=2), target)
        one_line(caught.value)
    assert os.listdir(tmp_path) == ["a"]
    assert load(folder).id == adapter(seed=1).id


def test_a_last_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(adapter(seed=1), tmp_path / "a")
    real, calls = os.replace, 0

    def third_fails(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", third_fails)
        with pytest.raises(PolytaskError, match="Input/output error"):
            save(adapter(seed=2), folder)
    assert os.listdir(tmp_path) == ["a"]
    assert load(folder).id == adapter(seed=1).id


def test_a_disk_that_really_refuses(tmp_path: Path) -> None:
    """The tensors are written by safetensors' own code, which meets the limit by itself."""
    folder = save(adapter(seed=1), tmp_path / "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(PolytaskError) as caught:
            save(adapter(tensors=lora_tensors()), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(caught.value)
    assert os.listdir(tmp_path) == ["a"]
    assert load(folder).id == adapter(seed=1).id


@pytest.mark.parametrize(
    ("call", "nth", "after"), [("fsync", 1, False), ("fsync", 3, True), ("replace", 2, True), ("replace", 3, True)]
)
def test_kill_9_at_any_moment(tmp_path: Path, call: str, nth: int, after: bool) -> None:
    """With an adapter there, the renames are: new over old (refused), old aside, new in place."""
    folder = save(adapter(seed=1), tmp_path / "a")

    def work() -> None:
        real, count = getattr(os, call), 0

        def dies(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth and not after:
                die()
            done = real(*args, **kwargs)
            if count == nth:
                die()
            return done

        setattr(os, call, dies)
        save(adapter(seed=2), folder)

    killed(work)
    complete = call == "replace" and nth == 3
    assert load(folder).id == adapter(seed=2 if complete else 1).id
    save(adapter(seed=3), folder)
    assert load(folder).id == adapter(seed=3).id
    assert not (tmp_path / ".a.previous").exists()


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    old, fresh = tmp_path / ".a.1-x.tmp", tmp_path / ".a.2-y.tmp"
    old.mkdir()
    fresh.mkdir()
    os.utime(old, (0, 0))
    save(adapter(), tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == [".a.2-y.tmp", "a"]
