"""The referee: what lm-eval measures of an engine is what it measures of the same model in its own `hf` class."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

import datasets
import lm_eval
import numpy as np
import tiny
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from made import one_line
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polytask.adapters import Adapter, Card, HeadCard, TextCard, export_peft
from polytask.adapters.expression import mix
from polytask.backbones import Backbone
from polytask.errors import PolytaskError, UsageError
from polytask.evaluation import lm_eval as referee
from polytask.evaluation.lm_eval import PolytaskLM, compare, evaluate
from polytask.evaluation.significance import mcnemar
from polytask.inference import Ask, Engine
from polytask.library import Library
from polytask.methods import build
from polytask.tasks import TaskCard

LENGTH = 48  # positions, so that some texts are too long
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "home", "at", "noon", "été"]
CHAT = (
    "{{ bos_token if bos_token is defined else '' }}"
    "{% for m in messages %}<|{{ 'user' if m['role'] != 'assistant' else 'assistant' }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' and not (loop.last and continue_final) %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(*, begin: bool = False, end: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens, with a token before or behind every text where asked for."""
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|begin|>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 3, trainer)
    template = f"{'<|begin|> ' if begin else ''}$A{' <|end|>' if end else ''}"
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, i) for i, name in enumerate(special)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        bos_token="<|begin|>" if begin else None,
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT,
    )


def causal(seed: int = 0) -> PreTrainedModel:
    """A tiny llama whose answers vary."""
    made = tiny.make_lm(
        "llama",
        seed,
        vocab_size=320,
        max_position_embeddings=LENGTH,
        pad_token_id=1,
        bos_token_id=4,
        eos_token_id=0,
        attn_implementation="eager",
    )
    with torch.no_grad():
        W = made.get_output_embeddings().weight
        W.mul_(6)
        W[0] = 1.1 * W[tokenizer().convert_tokens_to_ids("c")]  # so that it ends some answers by itself
    return made


def lora(backbone: Backbone, name: str, seed: int) -> Adapter:
    method = build("lora", {"r": 4, "alpha": 8.0, "sites": ("*.attn.[qvo]", "*.mlp.up")})
    draw = torch.Generator().manual_seed(seed)
    tensors = {n: t + 0.3 * torch.randn(t.shape, generator=draw) for n, t in method.start(backbone, seed).items()}
    return Adapter(
        method="lora",
        hyperparameters=method.hyperparameters(),
        tensors=tensors,
        backbone=backbone.card(),
        card=Card(name=name, task=TaskCard(name=name, kind="generation")),
        head=HeadCard(kind="generation", text=TextCard(template="plain")),
    )


# -- tasks -------------------------------------------------------------------------------------------------------------


def line(rng: np.random.Generator, n: int) -> str:
    return " ".join(rng.choice(WORDS, n))


def records() -> dict[str, list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    choice = [
        # Contexts shorter and longer than the model, one that ends in spaces, choices of one token and of several.
        {
            "text": line(rng, int(rng.choice([2, 5, 30, 60]))) + ("  " if n % 3 == 0 else ""),
            "options": [line(rng, k) for k in (1, 1, 2, 4)] + ["Zürich 7", "cat"],
            "label": int(rng.integers(6)),
        }
        for n in range(30)
    ]
    text = [{"text": line(rng, int(n))} for n in rng.choice([1, 3, 20, 60, 150], 12)]
    last = [{"text": line(rng, int(n)), "last": line(rng, 1)} for n in rng.choice([1, 5, 50], 20)]
    ask = [{"text": line(rng, int(n)), "answer": line(rng, 2)} for n in rng.choice([1, 4, 12, 60], 16)]
    return {"choice": choice, "text": text, "last": last, "ask": ask}


TASKS: dict[str, dict[str, Any]] = {
    "choosing": {
        "data": "choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": "acc"},
            {"metric": "acc_norm"},
            {"metric": "acc_mutual_info"},
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "shown": {
        "data": "choice",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{text[:12]}}\nA:",
        "doc_to_choice": "{{options[:3]}}",
        "doc_to_target": "{{label % 3}}",
        "fewshot_split": "test",
        "num_fewshot": 1,
    },
    "rolling": {
        "data": "text",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
    },
    "finishing": {
        "data": "last",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": " {{last}}",
    },
    "writing": {
        "data": "ask",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [";", "mat", "bb"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
            {"metric": "chrf", "aggregation": "chrf", "higher_is_better": True},
        ],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of local tasks; nothing is looked up elsewhere."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in records().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        said = {"task": name, "dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}} | task
        data = str(folder / f"{said.pop('data')}.jsonl")
        said["dataset_kwargs"] = {"data_files": {"test": data}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(said))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")  # asks pip, lscpu, ...
        yield folder


@pytest.fixture(scope="module")
def manager(folder: Path) -> TaskManager:
    return TaskManager(include_path=str(folder), include_defaults=False)


@dataclass
class Case:
    """A model twice: as an engine, and as the Hugging Face model that lm-eval reads by itself."""

    engine: Engine
    theirs: HFLM
    adapter: str | None = None


def hflm(model: Any, tokens: Any, **options: Any) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokens, batch_size=4, **options)


@pytest.fixture(scope="module")
def plain() -> Case:
    model, tokens = causal(), tokenizer()
    return Case(Engine(Backbone(model, tokens, "tiny", precision="fp32", device="cpu")), hflm(causal(), tokens))


@pytest.fixture(scope="module")
def begun() -> Case:
    """The tokenizer puts a token before every text."""
    tokens = tokenizer(begin=True)
    return Case(Engine(Backbone(causal(), tokens, "tiny", precision="fp32", device="cpu")), hflm(causal(), tokens))


@pytest.fixture(scope="module")
def adapted(plain: Case, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A LoRA adapter beside others, and the same in PEFT around a model of its own."""
    peft = pytest.importorskip("peft")
    backbone = plain.engine.backbone
    many = [lora(backbone, name, seed) for seed, name in enumerate(("first", "second"), 1)]
    folder = export_peft(many[0], tmp_path_factory.mktemp("peft"), backbone.sites)
    wrapped = peft.PeftModel.from_pretrained(causal(), folder).eval()
    return Case(Engine(backbone, adapters=many), hflm(wrapped, backbone.tokenizer), "first")


def scored(lm: Any, manager: TaskManager, *tasks: str, **options: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=lm, tasks=list(tasks or TASKS), task_manager=manager, bootstrap_iters=0, **options
    )
    assert found is not None
    return dict(found)


def same(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Every number of every item and every metric are the same; the largest difference of a log-likelihood."""
    most = 0.0
    assert mine["samples"].keys() == theirs["samples"].keys()
    for task, items in theirs["samples"].items():
        assert len(items) == len(mine["samples"][task]) > 0
        for a, b in zip(mine["samples"][task], items, strict=True):
            assert (a["doc_hash"], a["arguments"]) == (b["doc_hash"], b["arguments"])
            for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):
                if isinstance(y, str):
                    assert x == y
                    continue
                (x, greedy), (y, wanted) = (x, y) if isinstance(y, tuple) else ((x, None), (y, None))
                assert greedy == wanted
                assert x == pytest.approx(y, abs=1e-4, rel=1e-6)
                most = max(most, abs(x - y))
        for metric, value in theirs["results"][task].items():
            found = mine["results"][task][metric]
            assert found == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), metric
    return most


# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "begun", "adapted"])
def test_all_kinds_of_requests(case: str, request: pytest.FixtureRequest, manager: TaskManager) -> None:
    one: Case = request.getfixturevalue(case)
    mine = scored(PolytaskLM(engine=one.engine, adapter=one.adapter), manager)
    theirs = scored(one.theirs, manager)
    same(mine, theirs)
    # They have something to differ in: answers that `until` cut, that the model ended, and that ran full.
    written = [r for item in mine["samples"]["writing"] for (r,) in item["resps"]]
    assert len(set(written)) > 5
    assert not any(stop in text for text in written for stop in (";", "mat", "bb"))
    tokens = [len(one.theirs.tok_encode(text)) for text in written]
    assert min(tokens) < 8
    assert max(tokens) >= 16
    assert 0 < mine["results"]["choosing"]["acc,none"] < 1


def test_an_adapter_makes_a_difference(adapted: Case, manager: TaskManager) -> None:
    with_it, without = (scored(PolytaskLM(engine=adapted.engine, adapter=a), manager) for a in ("first", None))
    ours, base = (one["results"]["rolling"]["bits_per_byte,none"] for one in (with_it, without))
    assert abs(ours - base) > 0.05


def test_a_chat_template(plain: Case, begun: Case, manager: TaskManager) -> None:
    for case in (plain, begun):
        options: dict[str, Any] = {"apply_chat_template": True, "system_instruction": "Say it.", "num_fewshot": 1}
        mine = scored(PolytaskLM(engine=case.engine), manager, "shown", "writing", **options)
        same(mine, scored(case.theirs, manager, "shown", "writing", **options))
        prompt = mine["samples"]["shown"][0]["arguments"][0][0]
        assert prompt.startswith(("<|user|>Say it.", "<|begin|><|user|>Say it."))
        assert prompt.endswith("<|assistant|>")
        # A text that shows its own beginning gets no second one.
        assert PolytaskLM(engine=case.engine).tok_encode(prompt).count(4) == (case is begun)


def test_another_length_and_prefix(plain: Case, manager: TaskManager) -> None:
    mine = PolytaskLM(engine=plain.engine, max_length=24, prefix_token_id=7)
    theirs = hflm(causal(), plain.engine.backbone.tokenizer, max_length=24, prefix_token_id=7)
    same(scored(mine, manager), scored(theirs, manager))


def test_an_encoder_decoder(manager: TaskManager) -> None:
    tokens = tokenizer(end=True)

    def model() -> PreTrainedModel:
        return tiny.make_lm(
            "t5", vocab_size=320, pad_token_id=1, eos_token_id=0, decoder_start_token_id=1, n_positions=64
        )

    engine = Engine(Backbone(model(), tokens, "tiny-t5", precision="fp32", device="cpu"))
    theirs = hflm(model(), tokens, max_length=LENGTH)
    kinds = ("choosing", "finishing", "rolling")
    same(scored(PolytaskLM(engine=engine), manager, *kinds), scored(theirs, manager, *kinds))


def test_an_end_token_behind_every_text_is_no_part_of_a_decoders_context() -> None:
    tokens = tokenizer(begin=True, end=True)
    lm = PolytaskLM(engine=Engine(Backbone(causal(), tokens, "tiny", precision="fp32", device="cpu")))
    bare = tokens("the cat", add_special_tokens=False)["input_ids"]
    assert lm.tok_encode("the cat") == [4, *bare]
    assert lm.tok_encode("the cat", add_special_tokens=False) == bare
    assert lm.tok_encode("the cat<|end|>") == [4, *bare, 0]


def test_likelihoods_of_a_mixture_are_the_engines_own(adapted: Case) -> None:
    engine = adapted.engine
    asked = [("the cat", " sat on a mat"), ("two dogs", " run"), ("été", " at noon and")]
    for who in (None, "second", mix({"first": 0.7, "second": -0.4}), {"first": 0.25, "second": 1.5}):
        lm = PolytaskLM(engine=engine, adapter=who)
        ref = mix(who) if isinstance(who, dict) else who
        own = engine.logprobs([Ask(c, ref) for c, _ in asked], [a for _, a in asked], end=False)
        found = lm.loglikelihood([SimpleNamespace(args=pair) for pair in asked], disable_tqdm=True)
        for (logprob, _), each in zip(found, own, strict=True):
            assert logprob == pytest.approx(float(each.sum()), abs=1e-4)


def test_what_is_greedy_is_what_generate_writes(adapted: Case) -> None:
    lm = PolytaskLM(engine=adapted.engine, adapter="second")
    contexts = ["the cat", "two dogs run home", "noon"]
    rule = {"until": [], "max_gen_toks": 3}
    said = lm.generate_until([SimpleNamespace(args=(c, rule)) for c in contexts], disable_tqdm=True)
    tokens = lm.tokenizer
    pairs = [
        (None, lm.tok_encode(c), tokens(s, add_special_tokens=False)["input_ids"])
        for c, s in zip(contexts, said, strict=True)
    ]
    kept = [(pair, tokens.decode(pair[2])) for pair in pairs if len(pair[2]) == 3]
    assert kept  # those whose text comes back as the tokens that were written
    for pair, _ in kept:
        (_, greedy), (_, changed) = lm._loglikelihood_tokens(
            [pair, (None, pair[1], [*pair[2][:-1], (pair[2][-1] + 1) % 320])], disable_tqdm=True
        )
        assert (greedy, changed) == (True, False)


# -- several adapters --------------------------------------------------------------------------------------------------


def test_adapters_are_scored_and_compared_over_one_backbone(
    adapted: Case, folder: Path, manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(referee, "load", lambda *_, **__: pytest.fail("the backbone is there already"))
    before = adapted.engine.backbone.model.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    both = {"first": 0.5, "second": 0.5}
    found = evaluate(adapted.engine, list(TASKS), [None, "first", both], include_path=str(folder), bootstrap_iters=0)
    assert list(found) == ["none", "first", "0.5 * first + 0.5 * second"]
    assert torch.equal(adapted.engine.backbone.model.state_dict()["model.layers.0.self_attn.q_proj.weight"], before)
    same(found["first"], scored(adapted.theirs, manager))
    config = found["0.5 * first + 0.5 * second"]["config"]
    ids = {name: adapted.engine.find(name) for name in ("first", "second")}
    assert (config["adapter"], config["adapters"]) == ("0.5 * first + 0.5 * second", ids)
    assert config["fingerprint"] == adapted.engine.backbone.fingerprint

    differences = compare(found["first"], found["none"], resamples=200)
    for task, metrics in differences.items():
        for name, one in metrics.items():
            reported = [found[who]["results"][task][name] for who in ("first", "none")]
            assert (one.first, one.second) == pytest.approx(tuple(reported)), (task, name)
            assert one.low <= one.difference <= one.high
    assert set(differences) == set(TASKS)
    acc = differences["choosing"]["acc,none"]
    rights = [[item["acc"] for item in found[who]["samples"]["choosing"]] for who in ("first", "none")]
    assert acc == mcnemar(*rights, metric="acc")
    assert differences["rolling"]["word_perplexity,none"].test == "paired bootstrap"
    assert differences["writing"]["chrf,none"].n == 16
    assert "acc 0." in str(acc)


def test_a_perplexitys_difference_is_resampled_over_documents(adapted: Case, folder: Path) -> None:
    """By hand: Σ log p and Σ words of the documents drawn."""
    found = evaluate(adapted.engine, "rolling", [None, "second"], include_path=str(folder), bootstrap_iters=0)
    one = compare(found["second"], found["none"], resamples=50, seed=3)["rolling"]["word_perplexity,none"]
    draw = np.random.default_rng(3).integers(0, 12, (50, 12))
    sides = []
    for who in ("second", "none"):
        parts = np.array([item["word_perplexity"] for item in found[who]["samples"]["rolling"]])
        sums = parts[draw].sum(1)
        sides.append(np.exp(-sums[:, 0] / sums[:, 1]))
    low, high = np.percentile(sides[0] - sides[1], [2.5, 97.5])
    assert (one.low, one.high) == pytest.approx((low, high), rel=1e-9)


def test_other_items_are_not_compared(plain: Case, manager: TaskManager) -> None:
    lm = PolytaskLM(engine=plain.engine)
    some, all_, other = (
        scored(lm, manager, "finishing", limit=5),
        scored(lm, manager, "finishing"),
        scored(lm, manager, "rolling"),
    )
    for second, says, kind in (
        (all_, "finishing: the two were not scored on the same items", PolytaskError),
        (other, "not scored on the same tasks: finishing, rolling", UsageError),
        ({"results": {}}, "no samples to compare", UsageError),
    ):
        with pytest.raises(kind, match=says) as error:
            compare(some, second)
        one_line(error.value)


def test_a_metric_with_code_of_its_own_is_left_out(plain: Case, manager: TaskManager) -> None:
    found = scored(PolytaskLM(engine=plain.engine), manager, "finishing")
    assert set(compare(found, found)["finishing"]) == {"acc,none", "perplexity,none"}
    found["configs"]["finishing"]["metric_list"] = [
        {"metric": "acc", "aggregation": "def f(items): ..."},
        {"metric": "perplexity", "aggregation": "mean"},  # whose mean is not what was reported
    ]
    assert compare(found, found) == {"finishing": {}}


# -- by name, from the command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(adapted: Case, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The model in a folder and its adapters in a library, named by that folder."""
    place = tmp_path_factory.mktemp("saved")
    base = place / "base"
    causal().save_pretrained(base)
    adapted.engine.backbone.tokenizer.save_pretrained(base)
    library = Library(place / "library")
    card = adapted.engine.backbone.card().model_copy(update={"name": str(base)})
    for one in adapted.engine.adapters:
        library.add(Adapter(one.method, one.hyperparameters, one.tensors, card, one.card, one.head))
    return SimpleNamespace(base=base, library=place / "library")


@pytest.mark.parametrize("base", [True, False])
def test_the_model_is_in_lm_evals_registry(
    saved: SimpleNamespace, adapted: Case, manager: TaskManager, base: bool
) -> None:
    given = f"library={saved.library},precision=fp32" + (f",base={saved.base}" if base else "")
    mine = scored("polytask", manager, "finishing", model_args=f"{given},adapter=first", batch_size=8)
    same(mine, scored(adapted.theirs, manager, "finishing"))
    mixed = scored("polytask", manager, "finishing", model_args=f"{given},adapter=0.5*first + 0.5*second")
    own = scored(PolytaskLM(engine=adapted.engine, adapter={"first": 0.5, "second": 0.5}), manager, "finishing")
    same(mixed, own)


@pytest.mark.slow
def test_the_command(saved: SimpleNamespace, folder: Path, adapted: Case, manager: TaskManager, tmp_path: Path) -> None:
    args = f"base={saved.base},library={saved.library},adapter=first,precision=fp32"
    command = [sys.executable, "-m", "polytask.evaluation.lm_eval", "--model", "polytask", "--model_args", args]
    command += ["--tasks", "choosing,writing", "--include_path", str(folder), "--output_path", str(tmp_path)]
    done = subprocess.run([*command, "--log_samples"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "|choosing|" in done.stdout
    written = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    wrong = subprocess.run(
        [p.replace("adapter=first", "adapter=third") for p in command], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("polytask: third: no such adapter in")
    theirs = scored(adapted.theirs, manager, "choosing", "writing")
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isnan(value):
                assert written["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)


def test_the_task_in_the_documentation(plain: Case, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "referee.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    rows = [{"text": f"ticket {n}", "team": ("billing", "returns")[n % 2]} for n in range(4)]
    (tmp_path / "routing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "routing.yaml").write_text(block.replace("/data/", f"{tmp_path}/"))
    found = evaluate(plain.engine, ["routing"], include_path=tmp_path, bootstrap_iters=0, limit=3)
    items = found["none"]["samples"]["routing"]
    assert [item["target"] for item in items] == ["billing", "returns", "billing"]
    assert items[1]["arguments"][2] == ("ticket 1\nTeam:", " returns")
    best = [("billing", "delivery", "returns")[int(np.argmax([r[0][0] for r in item["resps"]]))] for item in items]
    assert [item["acc"] for item in items] == [float(b == item["target"]) for b, item in zip(best, items, strict=True)]


# -- answers -----------------------------------------------------------------------------------------------------------


def asked(*contexts: str, **rule: Any) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=(context, {"until": [], "max_gen_toks": 8, **rule})) for context in contexts]


def test_answers_are_drawn_each_with_numbers_of_its_own(plain: Case) -> None:
    lm = PolytaskLM(engine=plain.engine, seed=5)
    many = asked(*["the cat"] * 6, do_sample=True, temperature=1.0, top_p=0.9)
    drawn = lm.generate_until(many, disable_tqdm=True)
    assert len(set(drawn)) > 1
    assert lm.generate_until(many, disable_tqdm=True) == drawn
    assert PolytaskLM(engine=plain.engine, seed=6).generate_until(many, disable_tqdm=True) != drawn
    greedy = lm.generate_until(asked(*["the cat"] * 2), disable_tqdm=True)
    assert greedy[0] == greedy[1]
    # What is said of drawing is nothing where nothing is drawn; a temperature alone draws.
    assert (
        lm.generate_until(asked("the cat", do_sample=False, top_p=0.1, temperature=0.7), disable_tqdm=True)
        == greedy[:1]
    )
    assert len(set(lm.generate_until(asked(*["the cat"] * 6, temperature=1.5), disable_tqdm=True))) > 1


def test_a_special_token_stops_an_answer_though_it_has_no_text(plain: Case) -> None:
    lm = PolytaskLM(engine=plain.engine)
    cat, user = lm.tokenizer.convert_tokens_to_ids(["cat", "<|user|>"])
    assert lm._said([cat, user, cat], ["<|user|>"]) == "cat"
    assert lm._said([cat, user, cat], ["\n"]) == "catcat"
    assert lm._said([cat, user, cat], ["at"]) == "c"


def test_an_empty_context_and_cached_answers(plain: Case) -> None:
    lm = PolytaskLM(engine=plain.engine)
    kept: dict[tuple[str, Any], Any] = {}
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda kind, args, found: kept.__setitem__((kind, str(args)), found)))
    assert len(lm.generate_until(asked("", "the cat"), disable_tqdm=True)) == 2
    likely = lm.loglikelihood([SimpleNamespace(args=("", "the cat"))], disable_tqdm=True)
    rolling = lm.loglikelihood_rolling([SimpleNamespace(args=("the cat",))], disable_tqdm=True)
    assert likely[0][0] == pytest.approx(rolling[0], abs=1e-5)
    assert {kind for kind, _ in kept} == {"loglikelihood", "loglikelihood_rolling", "generate_until"}
    assert kept["loglikelihood", "('', 'the cat')"] == likely[0]
    assert lm.generate_until([]) == lm.loglikelihood([]) == lm.loglikelihood_rolling([]) == []


# -- errors ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_scored(plain: Case, adapted: Case, saved: SimpleNamespace, folder: Path) -> None:
    engine, lm = plain.engine, PolytaskLM(engine=plain.engine)
    bert = Engine(tiny.backbone("bert", tokenizer=tiny.words("a")))
    mute = PolytaskLM(engine=Engine(tiny_without_chat()))
    cases: list[tuple[Any, str]] = [
        (lambda: PolytaskLM(engine=bert), "no language-model head"),
        (lambda: PolytaskLM(), "say which backbone"),
        (lambda: PolytaskLM(library=str(saved.library)), "say which backbone"),
        (lambda: PolytaskLM(library=str(saved.library), adapter="third"), "third"),
        (lambda: PolytaskLM(str(saved.base), engine=engine), "and not both"),
        (lambda: PolytaskLM(engine=engine, adapter="third"), "no adapter 'third' here"),
        (lambda: PolytaskLM(engine=engine, adapter=7), "no adapter '7' here"),
        (lambda: PolytaskLM(engine=engine, max_length=LENGTH + 1), "max_length = 49"),
        (lambda: lm.generate_until(asked("a", repetition_penalty=1.1)), "repetition_penalty"),
        (lambda: lm.generate_until(asked("a", max_gen_toks=LENGTH)), "leaves no room"),
        (lambda: lm._loglikelihood_tokens([(None, [1], [])]), "no tokens of its own"),
        (lambda: lm._loglikelihood_tokens([(None, [1], [2] * 49)]), "49 tokens"),
        (lambda: mute.apply_chat_template([{"role": "user", "content": "a"}]), "no chat template"),
        (lambda: evaluate(adapted.engine, "rolling", [None, "first"], use_cache="x"), "use_cache"),
    ]
    for wrong, says in cases:
        with pytest.raises(PolytaskError, match=says) as error:
            wrong()
        one_line(error.value)


def tiny_without_chat() -> Backbone:
    tokens = tokenizer()
    tokens.chat_template = None
    return Backbone(causal(), tokens, "tiny", precision="fp32", device="cpu")


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UsageError, match=r"the referee needs lm-eval: pip install 'polytask\[lm-eval\]'"):
        importlib.reload(referee)
