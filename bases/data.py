"""Step 2: build the training stream, prove that nothing held out is in it, and pack it for the journey.

    python -m bases.data build  --data $POLYTASK_DATA --cache bases/cache    # tokenised once, uint16
    python -m bases.data audit  --data $POLYTASK_DATA --cache bases/cache    # decodes the stream and looks again
    python -m bases.data pack   --cache bases/cache --out bases/cache/stream.bin.xz
    python -m bases.data unpack --cache bases/cache bases/cache/stream.bin.xz

The cache: `tokens.npy` (uint16, the documents one after the other, each ending in <|endoftext|>), `documents.npy` (one
row a document, see DOCUMENT), `manifest.json` (sources, licences, counts, the audit, what to ask the finished model)
and `tokenizer/`. Only training splits are trained on. What has no split of its own gets one here: a fifth of the inputs
of function_vectors, by hash, is held out.

polytask is imported where it is used: who unpacks a cache and trains on it needs none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from bases.audit import HeldOut, report
from bases.tokenizer import EOT

if TYPE_CHECKING:
    from bases.templates import Source
    from polytask.tasks import Example, Task

# Share of the tokens of one pass, and why. A pass sees the novels once and repeats or thins out the rest to fit.
MIX: dict[str, tuple[float, str]] = {
    "novels": (
        0.30,
        "all the long English there is, one time each; no more, because what the model will be asked for is tasks",
    ),
    "speeches": (0.02, "formal prose; little of it, so no more than about twice a pass"),
    "sgd_dialogues": (0.08, "two-party dialogue: requests, values, confirmations"),
    "tldr_pages": (0.06, "command lines with placeholders, which no prose has"),
    "tasks": (0.33, "instruction, input and output of everyday tasks, as a user of polytask has them"),
    "superni": (0.17, "many more instructions, in the format that the model has to follow unseen"),
    "induction": (0.04, "short word tasks shown by examples only; small, and easily repeated too often"),
}
SHARES = {group: share for group, (share, _) in MIX.items()}
TEXTS = ("novels", "speeches", "sgd_dialogues", "tldr_pages")
LICENCES = {
    "novels": "public domain texts (CC BY 4.0 markup)",
    "speeches": "public domain",
    "sgd_dialogues": "CC BY-SA 4.0",
    "tldr_pages": "CC BY 4.0",
}
RETRIEVAL = (
    "scitldr_retrieval",
    "tldr_retrieval",
)  # their training pairs are those of scitldr_summary and tldr_command
VARIANTS = 2  # surfaces of each example
EVERY = {
    "novels": 94,
    "speeches": 20,
    "sgd_dialogues": 100,
    "tldr_pages": 50,
}  # one document in so many is for perplexity
EVERY_EXAMPLE = 50

# `answer`: where the answer begins, 0 for text without one; `held`: for perplexity, never trained on.
DOCUMENT = np.dtype([("length", "u4"), ("answer", "u4"), ("source", "u2"), ("held", "u1")])


# --- reading --------------------------------------------------------------------------------------


def read_texts(data: Path, group: str) -> Iterator[str]:
    """The documents of one text source."""
    with lzma.open(data / "corpus" / f"{group}.txt.xz", "rt", encoding="utf-8") as file:
        yield from (text for part in file.read().split(EOT) if (text := part.strip()))


def read_sources(data: Path) -> Iterator[Source]:
    """Every task with its training examples, as polytask reads it, and no example of another split."""
    from bases.templates import Source
    from polytask.tasks import Example, Task

    tasks = data / "tasks"
    for card in sorted(tasks.glob("*/task.json")):
        if card.parent.name not in RETRIEVAL:
            task = Task.read(card.parent)
            yield Source.of(f"tasks/{task.name}", task, task.train)
            yield from _derived(task)
    forbidden = set((tasks / "superni/test_tasks.txt").read_text().split())
    for path in sorted((tasks / "superni/train").glob("*.json")):
        if path.stem not in forbidden:
            # These files have no splits: those that the reader makes are for users, and all of them is to train on.
            task = Task.read(path)
            yield Source.of(f"superni/{path.stem}", task, (*task.train, *task.validation, *task.test))
    for path in sorted((tasks / "instruction_induction").glob("*.json")):
        # Here the reader makes a validation split out of train; test is the file's own.
        task = Task.read(path)
        train = (*task.train, *task.validation)
        yield Source.of(f"induction/{path.stem}", task, train, _json(path)["Definition"])
    for path in sorted((tasks / "function_vectors").glob("*/*.json")):
        rows = [Example(str(n), str(row["input"]), str(row["output"])) for n, row in enumerate(_json(path))]
        # Its tasks have no instruction: they are shown, never told.
        task = Task(path.stem, "generation")
        yield Source.of(f"induction/fv_{path.stem}", task, [e for e in rows if not in_held_fifth(e.text)])


def read_held_out(data: Path) -> Iterator[tuple[str, str]]:
    """(task, input) of everything that is measured on: validation and test splits, test tasks, bbh, test queries."""
    tasks = data / "tasks"
    for card in sorted(tasks.glob("*/task.json")):
        for split in ("validation", "test"):
            path = card.parent / f"{split}.jsonl"
            for row in _rows(path) if path.exists() else ():
                yield card.parent.name, row["input"] if "input" in row else " ".join(row["tokens"])
                if "text2" in row:
                    yield card.parent.name, f"Text 1: {row['text1']}\nText 2: {row['text2']}"
    for name in RETRIEVAL:
        queries = _rows(tasks / name / "queries.jsonl")
        yield from ((name, row["text"]) for row in queries if row["split"] != "train")
    for path in sorted((tasks / "superni/test").glob("*.json")):
        yield from ((f"superni/{path.stem}", row["input"]) for row in _json(path)["Instances"])
    for path in sorted((tasks / "instruction_induction").glob("*.json")):
        yield from ((path.stem, row["input"]) for row in _json(path)["Instances"] if row["split"] != "train")
    for path in sorted((tasks / "function_vectors").glob("*/*.json")):
        inputs = (str(row["input"]) for row in _json(path))
        yield from ((f"fv_{path.stem}", text) for text in inputs if in_held_fifth(text))
    for path in sorted((tasks / "bbh").glob("*.json")):
        yield from ((f"bbh/{path.stem}", row["input"]) for row in _json(path)["examples"])


def held_pages(data: Path) -> set[str]:
    """Programs whose manual page is the answer to a held-out example of tldr_command or tldr_retrieval."""
    tasks, names = data / "tasks", set()
    for split in ("validation", "test"):
        rows = _rows(tasks / "tldr_command" / f"{split}.jsonl")
        names |= {row["input"].removeprefix("Program: ").split(" (")[0] for row in rows}
    folder = tasks / "tldr_retrieval"
    held = {row["id"] for row in _rows(folder / "queries.jsonl") if row["split"] != "train"}
    pairs = (line.split("\t") for line in (folder / "qrels.tsv").read_text().splitlines()[1:])
    pages = {page for query, page, _ in pairs if query in held}
    return names | {row["text"].split(":")[0] for row in _rows(folder / "corpus.jsonl") if row["id"] in pages}


def in_held_fifth(text: str) -> bool:
    """Whether an input of a suite without splits is held out; the same answer in every task of the suite."""
    return hashlib.sha256(text.casefold().encode()).digest()[0] < 51


def _derived(task: Task) -> Iterator[Source]:
    """Tasks of their own, made of what else the rows of a task know."""
    from bases.templates import Source

    known, of, name = task.train[0].extra, replace(task, demonstrations=(), labels=()), f"tasks/{task.name}"
    if "intent" in known:
        asked = replace(of, kind="classification", instruction="Name the intent of this command to a voice assistant.")
        rows = [replace(e, input=e.text, output=e.extra["intent"]) for e in task.train]
        yield Source.of(f"{name}_intent", asked, rows)
    if "tags_knowledge" in known:
        wanted = "Find the tools and subjects that this sentence of a job advertisement asks for."
        rows = [replace(e, output=tuple(e.extra["tags_knowledge"])) for e in task.train]
        yield Source.of(f"{name}_knowledge", replace(of, instruction=wanted), rows)
    if "rationale" in known:
        wanted = "Solve this word problem step by step. The last line is the answer."
        rows = [replace(e, output=f"{e.extra['rationale']}\nAnswer: {e.output}") for e in task.train]
        yield Source.of(f"{name}_steps", replace(of, instruction=wanted), rows)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def licences(data: Path) -> dict[str, str]:
    """The licence of each source, as its card says it."""
    found = dict(LICENCES)
    for card in sorted((data / "tasks").glob("*/task.json")):
        found[f"tasks/{card.parent.name}"] = _json(card)["licence"]
    for path in sorted((data / "tasks/superni/train").glob("*.json")):
        found[f"superni/{path.stem}"] = ", ".join(_json(path)["Instance License"])
    return found | {"induction": "Apache-2.0 (instruction_induction); MIT (function_vectors)"}


# --- building -------------------------------------------------------------------------------------


def clean(source: Source, held: HeldOut, dropped: Counter[str]) -> Source:
    """The task without the examples, demonstrations and descriptions of labels that hold a held-out input."""
    from polytask.tasks.templates import Plain

    task, train, form = source.task, [], Plain()

    def told(text: str) -> str | None:
        return held.in_text(text) or held.in_lines(text)

    def found(e: Example) -> str | None:
        text, answer = form.input(task, e), form.answer(task, e)
        if held.in_field(text, is_input=True) or held.in_field(answer, is_input=False):
            return "field"
        return "text" if told(f"{text}\n{answer}") else None

    for e in task.train:
        if where := found(e):
            dropped[f"{source.name} ({where})"] += 1
        else:
            train.append(e)
    shown = tuple(e for e in task.demonstrations if not found(e))
    labels = tuple(replace(label, description="") if told(label.description) else label for label in task.labels)
    return replace(source, task=replace(task, train=tuple(train), demonstrations=shown, labels=labels))


def clean_texts(data: Path, group: str, held: HeldOut, dropped: Counter[str]) -> Iterator[str]:
    """The documents of a text source without those that hold a held-out input; of long ones only the paragraph goes."""
    pages = held_pages(data) if group == "tldr_pages" else set()
    for text in read_texts(data, group):
        if text.split("\n")[0] in pages:
            dropped[f"{group} (page)"] += 1
        elif len(text) < 20_000:
            if held.in_text(text):
                dropped[f"{group} (text)"] += 1
            else:
                yield text
        elif held.in_text(text):
            kept = [part for part in text.split("\n\n") if not held.in_text(part)]
            dropped[f"{group} (paragraph)"] += text.count("\n\n") + 1 - len(kept)
            # A hit may go over the seam of two paragraphs: then the document goes.
            if not held.in_text(joined := "\n\n".join(kept)):
                yield joined
            else:
                dropped[f"{group} (text)"] += 1
        else:
            yield text


def rendered(source: Source, seed: int = 0) -> Iterator[tuple[str, str, bool]]:
    """(prompt, answer, held for perplexity): VARIANTS surfaces of each example, one of a held one.

    Demonstrations are the task's own and examples of it that are trained on.
    """
    from bases.templates import render

    held = [n % EVERY_EXAMPLE == EVERY_EXAMPLE // 2 for n in range(len(source.task.train))]
    pool = [e for e, out in zip(source.task.train, held, strict=True) if not out]
    for number, (example, out) in enumerate(zip(source.task.train, held, strict=True)):
        random = Random(f"{seed} {source.name} {number}")
        for _ in range(1 if out else VARIANTS):
            yield *render(source, example, pool, random, held=out), out


def build(data: Path, cache: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Write the cache; `limit` keeps that many documents of each text and examples of each task, to try it out."""
    from bases.templates import SAMPLES

    tokenizer = Tokenizer.from_file(str(cache / "tokenizer/tokenizer.json"))
    end = tokenizer.token_to_id(EOT)
    held = HeldOut(read_held_out(data))
    dropped: Counter[str] = Counter()
    sources: dict[str, int] = {}
    tokens: list[np.ndarray] = []
    documents: list[tuple[int, int, int, int]] = []
    size: Counter[str] = Counter()

    def add(source: str, prompt: Sequence[int], rest: Sequence[int], out: bool) -> None:
        tokens.append(np.array([*prompt, *rest, end], np.uint16))
        documents.append((len(tokens[-1]), len(prompt), sources.setdefault(source, len(sources)), out))

    for group in TEXTS:
        for number, text in enumerate(clean_texts(data, group, held, dropped)):
            if limit and number >= limit:
                break
            size[group] += len(text.encode())
            add(group, (), tokenizer.encode(text).ids, number % EVERY[group] == EVERY[group] // 2)

    for source in read_sources(data):
        if limit:
            source = replace(source, task=replace(source.task, train=source.task.train[:limit]))
        made = []
        for prompt, answer, out in rendered(clean(source, held, dropped)):
            # A held-out input may have come about by putting the parts together.
            if held.in_document(prompt, answer):
                dropped[f"{source.name} (rendered)"] += 1
            else:
                made.append((prompt, answer, out))
        prompts = tokenizer.encode_batch_fast([prompt for prompt, _, _ in made])
        answers = tokenizer.encode_batch_fast([answer for _, answer, _ in made])
        for (prompt, answer, out), p, a in zip(made, prompts, answers, strict=True):
            size[source.name] += len((prompt + answer).encode())
            add(source.name, p.ids, a.ids, out)

    table = np.array(documents, DOCUMENT)
    np.save(cache / "tokens.npy", np.concatenate(tokens))
    np.save(cache / "documents.npy", table)
    known = licences(data)
    manifest: dict[str, Any] = {
        "vocabulary": tokenizer.get_vocab_size(),
        "tokens": int(table["length"].sum()),
        "sources": {
            name: {
                "licence": known.get(name) or known.get(name.split("/")[0]) or known[_parent(name, known)],
                "documents": int((table["source"] == number).sum()),
                "tokens": int(table["length"][table["source"] == number].sum()),
                "bytes": size[name],
                "held_documents": int(table["held"][table["source"] == number].sum()),
            }
            for name, number in sources.items()
        },
        "dropped": dict(dropped),
        "samples": SAMPLES,
    }
    _write(cache / "manifest.json", manifest)
    manifest["audit"] = audit(data, cache, held=held)
    _write(cache / "manifest.json", manifest)
    return manifest


def _parent(name: str, known: dict[str, str]) -> str:
    """The task folder that a task made of its other columns comes from."""
    return next(other for other in known if name.startswith(f"{other}_"))


def audit(data: Path, cache: Path, *, held: HeldOut | None = None) -> dict[str, Any]:
    """Look for held-out inputs in what was written, the decoded stream: all counts but `documents` must be 0."""
    held = held or HeldOut(read_held_out(data))
    tokenizer = Tokenizer.from_file(str(cache / "tokenizer/tokenizer.json"))
    names = list(_json(cache / "manifest.json")["sources"])
    tokens, table = np.load(cache / "tokens.npy", mmap_mode="r"), np.load(cache / "documents.npy")
    starts = np.cumsum(table["length"], dtype=np.int64) - table["length"]
    texts = np.array([name in TEXTS for name in names])[table["source"]]

    def decoded(chosen: np.ndarray) -> Iterator[tuple[str, str]]:
        for n in np.flatnonzero(chosen):
            start, answer = int(starts[n]), int(starts[n] + table["answer"][n])
            end = start + int(table["length"][n]) - 1  # without <|endoftext|>
            prompt, rest = (tokenizer.decode(ids.tolist(), False) for ids in (tokens[start:answer], tokens[answer:end]))
            yield prompt, rest

    prose = {"documents": 0, "13-gram": 0}
    for _, text in decoded(texts):
        prose["documents"] += 1
        prose["13-gram"] += held.in_text(text) is not None
    # A line of a novel may well be somebody's test input ("What is your name?"): lines count in the task part only.
    return {"held_out_inputs": len(held.raw), "task part": report(held, decoded(~texts)), "text part": prose}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --- the journey ----------------------------------------------------------------------------------

# Two-byte units: `lp=1` lets xz see them.
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 27, "lc": 2, "lp": 1, "pb": 1, "nice_len": 128}]
FILES = ("tokens.npy", "documents.npy", "manifest.json", "tokenizer")


def pack(cache: Path, out: Path) -> int:
    """The cache as one file; its size in bytes."""
    part = out.with_suffix(".part")
    with lzma.open(part, "wb", filters=XZ) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        for name in FILES:
            tar.add(cache / name, name)
    part.replace(out)
    return out.stat().st_size


def unpack(packed: Path, cache: Path) -> None:
    """The cache from that file."""
    cache.mkdir(parents=True, exist_ok=True)
    with lzma.open(packed) as file, tarfile.open(fileobj=file, mode="r|") as tar:
        tar.extractall(cache, filter="data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=("build", "audit", "pack", "unpack"))
    parser.add_argument("packed", nargs="?", type=Path, help="unpack: the file")
    parser.add_argument("--data", type=Path, default=os.environ.get("POLYTASK_DATA"), help="default: $POLYTASK_DATA")
    parser.add_argument("--cache", type=Path, default=Path("bases/cache"))
    parser.add_argument("--out", type=Path, default=Path("bases/cache/stream.bin.xz"), help="pack: the file")
    parser.add_argument("--limit", type=int, help="build: so many documents of each text, examples of each task")
    args = parser.parse_args()
    if args.step in ("build", "audit") and args.data is None:
        parser.error("set POLYTASK_DATA or give --data")
    if args.step == "unpack" and args.packed is None:
        parser.error("which file?")

    if args.step == "pack":
        print(f"{args.out}: {pack(args.cache, args.out) / 1e6:.1f} MB")
    elif args.step == "unpack":
        unpack(args.packed, args.cache)
    elif args.step == "audit":
        found = audit(args.data, args.cache)
        print(json.dumps(found, indent=1))
        raise SystemExit(0 if is_clean(found) else 1)
    else:
        manifest = build(args.data, args.cache, limit=args.limit)
        show(manifest)
        raise SystemExit(0 if is_clean(manifest["audit"]) else "held-out inputs in the stream: do not train on it")


def is_clean(found: dict[str, Any]) -> bool:
    """Whether an audit found nothing."""
    parts = (found["task part"], found["text part"])
    return not any(count for part in parts for key, count in part.items() if key != "documents")


def show(manifest: dict[str, Any]) -> None:
    """Print what was built, by group."""
    print(f"{'':<14}{'documents':>10}{'tokens':>12}{'B/token':>9}{'share':>7}{'times a pass':>14}")
    groups: dict[str, Counter[str]] = {}
    for name, source in manifest["sources"].items():
        groups.setdefault(name.split("/")[0], Counter()).update({k: v for k, v in source.items() if k != "licence"})
    whole = groups["novels"]["tokens"] / MIX["novels"][0]
    for group, n in groups.items():
        share = MIX[group][0]
        times = share * whole / n["tokens"]
        row = f"{n['documents']:>10,}{n['tokens']:>12,}{n['bytes'] / n['tokens']:>9.2f}{share:>7.0%}{times:>14.1f}"
        print(f"{group:<14}{row}")
    print(f"{manifest['tokens']:,} tokens; dropped: {sum(manifest['dropped'].values())} {manifest['dropped']}")
    print(json.dumps(manifest["audit"], indent=1))


if __name__ == "__main__":
    main()
