"""mergekit's files: its own numbers, what is refused, and whole checkpoints merged one tensor at a time."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import run
from made import one_line
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from polytask.composition import checkpoints
from polytask.composition.checkpoints import Checkpoint
from polytask.composition.mergekit import combined, merge_checkpoints, read_mergekit, rescaled
from polytask.errors import PolytaskError, UsageError

KEPT = json.loads(Path(__file__).with_name("mergekit_yaml.json").read_text(encoding="utf-8"))
X = torch.tensor(KEPT["x"])
SHARED = {"normalize": False, "lambda": 1.0, "rescale": True, "density": 1.0}


def by(method: str, weights: list[float], θ0: Tensor | None = None, **given: Any) -> Tensor:
    """A method on mergekit's test numbers; lists are one value for each model."""
    each = [
        SHARED | {n: v[k] if isinstance(v, list) else v for n, v in given.items()} | {"weight": w}
        for k, w in enumerate(weights)
    ]
    draws = [torch.Generator().manual_seed(k) for k in range(len(each))]
    return combined(method, X[0] if θ0 is None else θ0, iter(X[1 : 1 + len(each)]), each, draws)


# -- mergekit's numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["task_arithmetic", "task_arithmetic normalised", "ties", "ties plain"])
def test_mergekit_computed_the_same(name: str):
    """Numbers of mergekit 0.1.5; the file has the script that made them."""
    case = dict(KEPT["cases"][name])
    expected = torch.tensor(case.pop("merged"))
    found = by(name.partition(" ")[0], case.pop("weights"), **case)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_chance_leaves_has_the_sum_of_magnitudes_that_mergekit_gives_it():
    case = KEPT["cases"]["rescaled"]
    δ = X[1] - X[0]
    torch.testing.assert_close(rescaled(δ, δ * torch.tensor(case["mask"])), torch.tensor(case["kept"]))


def test_linear_by_hand():
    """(1·[2, 4] + 3·[6, 0]) / 4 = [5, 1]; without the division [20, 4]."""
    θ = [torch.tensor([2.0, 4.0]), torch.tensor([6.0, 0.0])]
    for normalise, expected in ((True, [5, 1]), (False, [20, 4])):
        each = [{"weight": w, "normalize": normalise} for w in (1, 3)]
        assert combined("linear", torch.zeros(2), iter(θ), each, []).tolist() == expected
    each = [{"weight": w, "normalize": True} for w in (1, -1)]
    with pytest.raises(UsageError, match="the weights add up to 0"):
        combined("linear", torch.zeros(2), iter(θ), each, [])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_by_hand(method: str, monkeypatch: pytest.MonkeyPatch):
    """Of δ = [1, −2, 3, 4] the first and the last are left, 5 of 10: twice as large. Of [3, 1, 1, −5] 8 of 10."""
    monkeypatch.setattr(torch, "bernoulli", lambda share, generator: torch.tensor([1.0, 0, 0, 1]))
    δ = [torch.tensor([1.0, -2, 3, 4]), torch.tensor([3.0, 1, 1, -5])]
    each = [SHARED | {"density": 0.5, "weight": w} for w in (1, 2)]
    found = combined(method, torch.ones(4), (d + 1 for d in δ), each, [torch.Generator()] * 2)
    sums = [2 + 7.5, 0, 0, 8 - 12.5] if method == "dare_linear" else [2 + 7.5, 0, 0, -12.5]
    assert found.tolist() == pytest.approx([1 + s for s in sums])
    each = [own | {"rescale": False} for own in each]
    plain = combined("dare_linear", torch.ones(4), (d + 1 for d in δ), each, [torch.Generator()] * 2)
    assert plain.tolist() == pytest.approx([1 + 1 + 6, 1, 1, 1 + 4 - 10])


def test_a_density_of_none_and_of_all():
    assert torch.equal(by("ties", [1.0], density=0.0), X[0])
    torch.testing.assert_close(by("dare_ties", [1.0], density=1.0), X[1])


# -- files -------------------------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    path = folder / "merge.yml"
    path.write_text(text, encoding="utf-8")
    return path


TIES = """\
models:
  - model: a
    parameters:
      weight: 1
      density: [0.2, 1.0]
  - model: b
    parameters:
      weight:
        - filter: mlp
          value: 0.25
        - value: [0, 1]
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: bfloat16
"""


def test_a_file_is_read(tmp_path: Path):
    recipe = read_mergekit(written(tmp_path, TIES))
    assert (recipe.method, recipe.base, [m.ref for m in recipe.models]) == ("ties", "base", ["a", "b"])
    assert (recipe.dtype, recipe.out_dtype) == (torch.bfloat16, None)
    assert recipe.notes == ("int8_mask is ignored: sums are in fp32",)
    assert recipe.settings == {"normalize": True, "int8_mask": True}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("merge_method: ties", "merge_method: slerp", "merge.yml:12: merge_method 'slerp' is not done; linear, task"),
        ("dtype: bfloat16", "dtype: int4", "merge.yml:17: dtype 'int4': one of float32, float16, bfloat16"),
        ("dtype: bfloat16", "slices: []", "merge.yml:17: slices: only whole models are merged, under `models`"),
        ("dtype: bfloat16", "colour: red", "merge.yml:17: colour: unknown; the fields are models, merge_method"),
        ("  normalize: true", "  gamma: 0.1", "merge.yml:15: ties has no parameter 'gamma'; it has density"),
        ("      weight: 1", "      normalize: true", "merge.yml:4: normalize is the whole merge's; put it under"),
        ("      weight: 1", "      weight: much", "merge.yml:4: weight = 'much': a number is needed"),
        ("  normalize: true", "  normalize: 1", "merge.yml:15: normalize = 1: a true or false is needed"),
        ("      weight: 1", "      epsilon: 1", "merge.yml:4: ties has no parameter 'epsilon'"),
        ("      weight: 1\n", "", "a has no weight; give it one"),
        ("      weight: 1\n", "      weight: [1, {value: 2}]\n", "merge.yml:4: weight = [1, {'value': 2}]: a number"),
        ("      weight: 1\n", "      weight: {filter: 3, value: 2}\n", "merge.yml:4: weight = {'filter': 3"),
        ("      weight: 1\n", "      weight: [[1]]\n", "merge.yml:4: weight = [[1]]: a number is needed"),
        ("merge_method: ties", "merge_method: [ties]", "merge.yml:12: merge_method \"['ties']\" is not done"),
        ("dtype: bfloat16", "dtype: [float16]", "merge.yml:17: dtype ['float16']: one of float32"),
        ("base_model: base\n", "", "ties needs a base_model"),
        ("  - model: a\n", "  - weight: 1\n", "merge.yml:2: each of models needs a `model`"),
        ("  - model: a", "  - model: a+lora", "a model with a LoRA on it is not read"),
        ("dtype: bfloat16", "tokenizer_source: union", "tokenizer_source: only the base model's tokenizer is kept"),
        ("merge_method: ties", "merge_method: [ties", "no YAML"),
    ],
)
def test_what_is_not_done_is_said_with_its_line(tmp_path: Path, old: str, new: str, says: str):
    assert old in TIES
    with pytest.raises(UsageError) as error:
        read_mergekit(written(tmp_path, TIES.replace(old, new, 1)))
    assert says in one_line(error.value)


def test_a_base_without_models(tmp_path: Path):
    text = "models: [{model: a, parameters: {weight: 1}}]\nmerge_method: ties\nbase_model: a\n"
    with pytest.raises(UsageError, match=r"merge\.yml:1: models: there is none beside the base"):
        read_mergekit(written(tmp_path, text))


def test_what_is_no_file():
    with pytest.raises(UsageError, match="cannot be read"):
        read_mergekit("nowhere.yml")


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two models, the second in several files."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        model = tiny.make_lm("llama", seed, tie_word_embeddings=False)
        model.save_pretrained(folder / name, max_shard_size="60KB" if name == "b" else "5GB")
    tiny.words("one", "two").save_pretrained(folder / "base")
    assert len(list((folder / "b").glob("*.safetensors"))) > 2
    return folder


def config(models: Path, folder: Path, text: str) -> Path:
    for name in ("base", "a", "b"):
        text = text.replace(f"model: {name}\n", f"model: {models / name}\n")
    return written(folder, text)


def weights(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def test_it_writes_a_model_that_transformers_loads(models: Path, tmp_path: Path):
    """Task arithmetic with a gradient over the blocks and a filter, in several files."""
    text = (
        TIES.replace("ties", "task_arithmetic")
        .replace("      density: [0.2, 1.0]\n", "")
        .replace("dtype: bfloat16\n", "")
    )
    path = config(models, tmp_path, text.replace("normalize: true", "lambda: 0.5"))
    recipe = read_mergekit(path)
    count = merge_checkpoints(recipe, tmp_path / "out", shard=60_000)
    base, a, b = (weights(models / name) for name in ("base", "a", "b"))
    found = weights(tmp_path / "out")
    assert found.keys() == base.keys()
    assert count == len(base)
    for name, θ in found.items():
        at = 0.0 if "layers." not in name else int(name.split("layers.")[1][0]) / 2
        w = 0.25 if "mlp" in name else at
        expected = base[name] + 0.5 * ((a[name] - base[name]) + w * (b[name] - base[name]))
        torch.testing.assert_close(θ, expected, rtol=1e-5, atol=1e-6)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 70_000 or len(load_file(file)) == 1 for file in files)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), found[name])
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("one two")["input_ids"][1:3] == [4, 5]


def test_dtypes_are_kept_and_asked_for(models: Path, tmp_path: Path):
    """`dtype` is that of the sums, `out_dtype` of the file; what is not said stays as the models have it."""
    linear = "models:\n  - model: a\n  - model: b\nmerge_method: linear\nparameters:\n  weight: 1\n"
    a, b = (weights(models / name) for name in ("a", "b"))
    for said, dtype in (
        ("", torch.float32),
        ("dtype: bfloat16\n", torch.bfloat16),
        ("out_dtype: float16\n", torch.float16),
    ):
        out = tmp_path / f"out{dtype}"
        merge_checkpoints(read_mergekit(config(models, tmp_path, linear + said)), out)
        assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
        for name, t in weights(out).items():
            assert t.dtype == dtype
            one, two = (x[name].to(dtype).float() if "dtype: b" in said else x[name] for x in (a, b))
            torch.testing.assert_close(t, ((one + two) / 2).to(dtype))
        if said:
            assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype


def test_dare_is_the_same_each_time_and_another_by_another_seed(models: Path, tmp_path: Path):
    text = TIES.replace("ties", "dare_ties").replace("  normalize: true\n", "  density: 0.5\n")
    recipe = read_mergekit(config(models, tmp_path, text.replace("      density: [0.2, 1.0]\n", "")))
    for out, seed in (("x", 0), ("y", 0), ("z", 1)):
        merge_checkpoints(recipe, tmp_path / out, seed=seed)
    x, y, z = ((tmp_path / out / "model.safetensors").read_bytes() for out in "xyz")
    assert x == y != z


def test_memory_holds_one_tensor_of_each_model(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """When a tensor is read, no more than those of this name and the one before are still there."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    own = Checkpoint.tensor

    def watched(self: Checkpoint, name: str) -> Tensor:
        nonlocal most
        t = own(self, name)
        alive.append(weakref.ref(t))
        most = max(most, sum(ref() is not None for ref in alive))
        return t

    monkeypatch.setattr(Checkpoint, "tensor", watched)
    text = TIES.replace("dtype: bfloat16\n", "")
    count = merge_checkpoints(read_mergekit(config(models, tmp_path, text)), tmp_path / "out")
    assert len(alive) == 3 * count
    assert most <= 3 + 3
    assert count > 20


def test_models_that_do_not_go_together(models: Path, tmp_path: Path):
    tiny.make_lm("llama", 3, tie_word_embeddings=False, intermediate_size=48).save_pretrained(tmp_path / "narrow")
    tiny.make_lm("llama", 3, tie_word_embeddings=False, num_hidden_layers=2).save_pretrained(tmp_path / "short")
    tiny.make_lm("llama", 3, tie_word_embeddings=False, num_hidden_layers=4).save_pretrained(tmp_path / "long")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "model.safetensors.index.json").write_text("{}")
    for name, says, kind in [
        ("lost", "damaged: it says of no tensor where it is", PolytaskError),
        ("narrow", r"is \[32, 48\] and not \[32, 64\]", PolytaskError),
        ("short", "is not there; models of one architecture", PolytaskError),
        ("long", "is not in .*base; models of one architecture", PolytaskError),
        ("empty", "no model.safetensors and no model.safetensors.index.json", UsageError),
        ("broken", "damaged or not there", PolytaskError),
        ("no/such/model", "no folder, and no model of the hub that can be had now", UsageError),
    ]:
        text = TIES.replace("model: a\n", f"model: {tmp_path / name}\n")
        with pytest.raises(kind, match=says) as error:
            merge_checkpoints(read_mergekit(config(models, tmp_path, text)), tmp_path / "out")
        one_line(error.value)
        assert not (tmp_path / "out").exists()


def test_a_tensor_of_a_type_that_cannot_be_merged_is_named(tmp_path: Path):
    (tmp_path / "eight").mkdir()
    save_file({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "eight" / "model.safetensors")
    with pytest.raises(PolytaskError, match="tensor w is of type F8_E4M3, which is not read"):
        Checkpoint(tmp_path / "eight")


def test_numbers_that_are_counts_are_the_base_s(tmp_path: Path):
    """Buffers of whole numbers are no weights."""
    for name, k in (("base", 1), ("a", 2)):
        (tmp_path / name).mkdir()
        save_file({"ids": torch.tensor([k]), "w": torch.tensor([float(k)])}, tmp_path / name / "model.safetensors")
    text = f"models: [{{model: {tmp_path}/a, parameters: {{weight: 2}}}}]\nmerge_method: task_arithmetic\n"
    recipe = read_mergekit(written(tmp_path, text + f"base_model: {tmp_path}/base\n"))
    merge_checkpoints(recipe, tmp_path / "out")
    assert {n: t.tolist() for n, t in weights(tmp_path / "out").items()} == {"ids": [1], "w": [3.0]}


def test_a_folder_that_holds_something_is_left_alone(models: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds mine\.txt"):
        merge_checkpoints(read_mergekit(config(models, tmp_path, TIES)), tmp_path / "out")


def test_what_fails_on_the_way_leaves_nothing(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: Any) -> Iterator[Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_raw", refused)
    with pytest.raises(PolytaskError, match="No space left on device"):
        merge_checkpoints(read_mergekit(config(models, tmp_path, TIES)), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yml"]


def test_the_command(models: Path, tmp_path: Path):
    path = config(models, tmp_path, TIES)
    done = run("merge", "--config", path, "--out", tmp_path / "out", "--shard", "0.00005")
    assert done.status == 0, done.err
    assert "merged by ties" in done.out.replace("\n", " ")
    assert "int8_mask is ignored" in done.out
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    said = run("merge", "--config", path, "--out", tmp_path / "again", "--json").json
    assert (said["method"], said["tensors"]) == ("ties", len(index["weight_map"]))
    for given, says in [
        (("--config", path), "--config needs --out"),
        (("x", "--config", path, "--out", tmp_path / "o"), "leave out x"),
        ((), "name the adapters to merge, or give --config FILE.yml"),
        (("a", "b", "--out", tmp_path / "o"), "--out and --shard are for --config"),
        (("--config", path, "--out", tmp_path / "o", "--rule", "ties"), "leave out --rule"),
        (("--config", tmp_path / "no.yml", "--out", tmp_path / "o"), "cannot be read"),
    ]:
        refused = run("merge", *given)
        assert refused.status == 2
        assert says in refused.error
