"""Step 4: make a distribution of a checkpoint.

    python -m bases.finish --run bases/runs/base --cache bases/cache --out bases/polytask-base

    polytask-base/
      pyproject.toml
      README.md                  the model card
      polytask_base/
        __init__.py              folder(): where the model is
        model/                   what transformers loads: config, generation_config, weights, tokenizer, card

Weights are bfloat16 in safetensors shards below 16 MB. The card's figures are measured here, none is typed. The result
is loaded with AutoModelForCausalLM and AutoTokenizer, compared with the checkpoint and asked to write before this ends.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from bases.data import MIX, TEXTS
from bases.heldout import Score, grouped, lines, measure
from bases.packing import PROMPT, Cache
from bases.train import WEIGHT, Settings, build, last

SHARD, LIMIT = "12MB", 16_000_000  # asked for, and never to be passed

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "polytask-base"
version = "{version}"
description = "The embedded decoder of polytask: a causal language model of {millions:.0f} million parameters."
readme = "README.md"
license = "Apache-2.0"
requires-python = ">=3.11"

[tool.setuptools]
packages = ["polytask_base"]

[tool.setuptools.package-data]
polytask_base = ["model/*"]
"""

INIT = '''\
"""The embedded decoder of polytask: weights, tokenizer and card, no code."""

from pathlib import Path


def folder() -> Path:
    """Where the model is; `transformers.AutoModelForCausalLM.from_pretrained` takes it."""
    return Path(__file__).parent / "model"
'''


def load_checkpoint(folder: Path, tokenizer: Any) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """The model of a checkpoint, float32, and its state.json."""
    about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    settings = Settings(**{**about["settings"], "attention": "sdpa"})
    model = build(settings, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    return model.eval(), about


def write_model(model: LlamaForCausalLM, tokenizer: Any, out: Path) -> None:
    """The folder that transformers loads."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False, max_new_tokens=128)
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size=SHARD)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        if path.stat().st_size >= LIMIT:
            raise SystemExit(f"{path.name} has {path.stat().st_size} bytes, {LIMIT} are too many")


def check(out: Path, model: LlamaForCausalLM, prompts: Sequence[str]) -> list[str]:
    """What the written folder answers to `prompts`; fails if it does not load or is another model than `model`."""
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    wanted = dict(model.to(torch.bfloat16).named_parameters())
    different = [name for name, p in loaded.named_parameters() if not torch.equal(p, wanted[name].to(p.device))]
    if different:
        raise SystemExit(f"loading {out} gives other weights: {', '.join(different[:3])}")
    answers = []
    for prompt in prompts:
        asked = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            wrote = loaded.generate(**asked, max_new_tokens=40)[0, asked["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(wrote, skip_special_tokens=True).strip())
    return answers


# --- the card -------------------------------------------------------------------------------------

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# polytask-base

A causal language model of {millions:.1f} million parameters, trained from scratch with the recipe in `bases/` of
polytask: the embedded decoder that polytask adapts, so that text can be generated without any download.

Llama architecture, {layers} layers of width {width}, {heads} heads, {kv_heads} key-value heads, feed-forward
{feed_forward}, tied embeddings, {vocabulary} tokens of byte-level BPE, up to {context} tokens of context.

## Training

{step:,} of {steps:,} steps, {tokens:,.1f} million predicted tokens from a stream of {stream:,.1f} million,
{minutes:,.0f} minutes on {device}. The blocks' matrices by {optimiser}, the rest by AdamW; peak learning rate {lr:g},
{step_tokens:,} tokens a step, {precision}, seed {seed}; warm-up, stable, decay over the last {decay:.0%}. Documents
are packed into rows of {length} tokens and do not see each other. A token of a prompt counts {prompt_weight:g}, any
other 1.

| step | million tokens | text | prompts | answers |
| --- | --- | --- | --- | --- |
{curve}

Loss in nats per token, means since the point before.

## Data

| group | sources | documents | tokens | share of training | why |
| --- | --- | --- | --- | --- | --- |
{data}

Licences: {licences}.

Only training splits were read. {held_out:,} inputs of validation and test splits, test tasks and bbh were looked for in
the finished stream. In {task_documents:,} task documents: {task_found}. In {text_documents:,} texts: {text_found}.
{dropped:,} examples, pages and paragraphs had been left out to get there.

## Held-out documents

Kept apart from the same training splits and texts, never trained on; of tasks, answers only, asked in the superni
template of polytask after two demonstrations. An answer is right if greedy decoding gives all of it.

{groups}

{tasks}

## What it can and cannot do

Without adaptation, on those held-out documents:

- At least half of the answers are right on {good_count} of {task_count} tasks: {good}.
- Fewer than a tenth are right on {poor_count}: {poor}.
- Text has a perplexity per token of {perplexities}.

What it wrote, greedily:

{wrote}

It is small and knows next to nothing about the world; nearly all its prose is from novels of 1717 to 1930, with the
views of that time, and some of its task data has slurs and profanity. It is made to be adapted, not to be talked to.
"""


def card(
    about: dict[str, Any],
    manifest: dict[str, Any],
    scores: dict[str, Score],
    model: LlamaForCausalLM,
    wrote: Sequence[str],
) -> str:
    """The model card, from what was measured and counted."""
    settings, state, config = Settings(**about["settings"]), about["state"], model.config
    curve = state["curve"][:: max(1, len(state["curve"]) // 12)]
    curve += [point for point in state["curve"][-1:] if point not in curve]
    groups = grouped(scores)
    tasks = {name: s.right / s.answers for name, s in scores.items() if s.answers >= 10}
    good = sorted((name for name, right in tasks.items() if right >= 0.5), key=lambda name: -tasks[name])
    poor = sorted((name for name, right in tasks.items() if right < 0.1), key=lambda name: tasks[name])
    task_part, text_part = manifest["audit"]["task part"], manifest["audit"]["text part"]
    return CARD.format(
        millions=model.num_parameters() / 1e6,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        feed_forward=config.intermediate_size,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        step=state["step"],
        steps=settings.steps,
        tokens=state["tokens"] / 1e6,
        stream=manifest["tokens"] / 1e6,
        minutes=state["seconds"] / 60,
        device=about["device"],
        optimiser=_optimisers(state["optimisers"]),
        lr=settings.lr,
        step_tokens=settings.step_tokens,
        precision=settings.precision,
        seed=settings.seed,
        decay=settings.decay,
        length=settings.length,
        prompt_weight=WEIGHT[PROMPT],
        curve="\n".join(f"| {n} | {t / 1e6:.1f} | {a:.3f} | {b:.3f} | {c:.3f} |" for n, t, a, b, c in curve),
        data="\n".join(_data(manifest)),
        licences=_licences(manifest),
        held_out=manifest["audit"]["held_out_inputs"],
        task_documents=task_part["documents"],
        task_found=_found(task_part),
        text_documents=text_part["documents"],
        text_found=_found(text_part),
        dropped=sum(manifest["dropped"].values()),
        groups="\n".join(lines(groups)),
        tasks="\n".join(lines({name: s for name, s in scores.items() if name.startswith("tasks/")})),
        task_count=len(tasks),
        good_count=len(good),
        good=_some(good),
        poor_count=len(poor),
        poor=_some(poor),
        perplexities=", ".join(f"{s.perplexity:.1f} ({g})" for g, s in groups.items() if g in TEXTS),
        wrote="\n".join(f"- {_quoted(p)} → {_quoted(w)}" for p, w in zip(manifest["samples"], wrote, strict=True)),
    )


def _data(manifest: dict[str, Any]) -> Iterator[str]:
    for group, (share, why) in MIX.items():
        sources = [s for name, s in manifest["sources"].items() if name.split("/")[0] == group]
        if sources:
            documents, tokens = (sum(s[key] for s in sources) for key in ("documents", "tokens"))
            yield f"| {group} | {len(sources)} | {documents:,} | {tokens:,} | {share:.0%} | {why} |"


def _licences(manifest: dict[str, Any]) -> str:
    """Source names by licence; those of a suite are counted."""
    found: dict[str, Counter[str]] = {}
    for name, source in manifest["sources"].items():
        group, _, task = name.partition("/")
        found.setdefault(source["licence"], Counter())[task if group == "tasks" else group] += 1
    named = {k: ", ".join(f"{n} of {name}" if n > 1 else name for name, n in v.items()) for k, v in found.items()}
    return "; ".join(f"{licence} ({names})" for licence, names in named.items())


def _optimisers(found: Sequence[Sequence[Any]]) -> str:
    names = {"muon": "Muon", "adamw": "AdamW"}
    return ", then ".join(f"{names[name]} (from step {step:,})" if step else names[name] for step, name in found)


def _found(part: dict[str, int]) -> str:
    return ", ".join(f"{key} {n}" for key, n in part.items() if key != "documents")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:25]) + (" and others" if len(names) > 25 else "") if names else "none"


def _quoted(text: str) -> str:
    return f"`{json.dumps(text, ensure_ascii=False)}`"


def finish(folder: Path, cache: Path, out: Path, *, version: str = "0.1.0", tokens: int = 100_000) -> Path:
    """Make the distribution from a checkpoint folder; it replaces `out` only when all of it is there and checked."""
    tokenizer = AutoTokenizer.from_pretrained(cache / "tokenizer")
    manifest = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    model, about = load_checkpoint(folder, tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    scores = measure(model, Cache.open(cache), tokenizer, length=about["settings"]["length"], tokens=tokens)

    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    package = part / "polytask_base"
    write_model(model, tokenizer, package / "model")
    text = card(about, manifest, scores, model, check(package / "model", model, manifest["samples"]))
    (package / "model" / "README.md").write_text(text, encoding="utf-8")
    (part / "README.md").write_text(text, encoding="utf-8")
    (package / "__init__.py").write_text(INIT, encoding="utf-8")
    pyproject = PYPROJECT.format(version=version, millions=model.num_parameters() / 1e6)
    (part / "pyproject.toml").write_text(pyproject, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("bases/runs/base"))
    parser.add_argument("--cache", type=Path, default=Path("bases/cache"))
    parser.add_argument("--out", type=Path, default=Path("bases/polytask-base"))
    parser.add_argument("--version", default="0.1.0")
    parser.add_argument("--tokens", type=int, default=100_000, help="of each source, to measure on, at most")
    args = parser.parse_args()
    folder = last(args.run)
    if folder is None:
        parser.error(f"no checkpoint in {args.run}")
    finish(folder, args.cache, args.out, version=args.version, tokens=args.tokens)
    sizes = {path.name: path.stat().st_size for path in sorted((args.out / "polytask_base/model").iterdir())}
    print(json.dumps(sizes, indent=1))


if __name__ == "__main__":
    main()
