"""Step 2: build the training stream, prove that nothing held out is in it, and pack it for the journey.

    python -m bases.data build  --data $POLYTASK_DATA --cache bases/cache    # tokenised once, uint16
    python -m bases.data audit  --data $POLYTASK_DATA --cache bases/cache    # decodes the stream and looks again
    python -m bases.data pack   --cache bases/cache --out bases/cache/stream.bin.xz
    python -m bases.data unpack --cache bases/cache bases/cache/stream.bin.xz

The cache: `tokens.npy` (uint16, the documents one after the other, each ending in <|endoftext|>), `documents.npy` (one
row a document, see DOCUMENT), `manifest.json` (sources, licences, counts, the audit) and `tokenizer/`. Only training
splits are read. What has no split of its own gets one here: a fifth of the inputs of function_vectors, by hash, is
held out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bases.audit import HeldOut, report
from bases.templates import EOT, Example, Pair, render

# Share of the tokens of one pass, and why. A pass sees the novels once and repeats or thins out the rest to fit.
MIX: dict[str, tuple[float, str]] = {
    "novels": (
        0.45,
        "all the long English there is; one time each, so that the rest cannot be learned by heart for it",
    ),
    "speeches": (0.02, "formal prose; little of it, so no more than about twice a pass"),
    "sgd_dialogues": (0.06, "two-party dialogue: requests, values, confirmations"),
    "tldr_pages": (0.04, "command lines with placeholders, which no prose has"),
    "tasks": (0.25, "instruction, input and output of everyday tasks, as a user of polytask has them"),
    "superni": (0.15, "many more instructions, in the format that the model has to follow unseen"),
    "induction": (0.03, "short word tasks shown by examples only; small, and easily repeated too often"),
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


def read_examples(data: Path) -> Iterator[Example]:
    """Every training example of every task, and of no other split."""
    tasks = data / "tasks"
    for card in sorted(tasks.glob("*/task.json")):
        if card.parent.name not in RETRIEVAL:
            yield from _task(card.parent.name, _json(card), _rows(card.parent / "train.jsonl"))
    forbidden = set((tasks / "superni/test_tasks.txt").read_text().split())
    for path in sorted((tasks / "superni/train").glob("*.json")):
        if path.stem not in forbidden:
            yield from _instances(f"superni/{path.stem}", _json(path))
    for path in sorted((tasks / "instruction_induction").glob("*.json")):
        yield from _instances(f"induction/{path.stem}", _json(path), split="train")
    for path in sorted((tasks / "function_vectors").glob("*/*.json")):
        for row in _json(path):
            if not in_held_fifth(str(row["input"])):
                # Its tasks have no instruction: they are shown, never told.
                yield Example(f"induction/fv_{path.stem}", ("",), str(row["input"]), str(row["output"]))


def read_held_out(data: Path) -> Iterator[tuple[str, str]]:
    """(task, input) of everything that is measured on: validation and test splits, test tasks, bbh, test queries."""
    tasks = data / "tasks"
    for card in sorted(tasks.glob("*/task.json")):
        for split in ("validation", "test"):
            path = card.parent / f"{split}.jsonl"
            yield from ((card.parent.name, _input(row)) for row in (_rows(path) if path.exists() else ()))
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


def _task(name: str, card: dict[str, Any], rows: Iterable[dict[str, Any]]) -> Iterator[Example]:
    """The examples of one task folder; tags become text, and what else its rows know becomes tasks of its own."""
    instruction, labels, shown = card["definition"], tuple(card["labels"] or ()), card["positive_examples"]
    if card["kind"] == "tagging":
        spans = any(label.startswith("B-") for label in labels)
        how = (
            ' Write "slot = words" for each, separated by "; ", or "none".'
            if spans
            else " Write word/TAG for each word."
        )
        told = (instruction.replace(", in BIO form", "").split(" (BIO")[0].rstrip(".") + "." + how,)
        names = tuple(dict.fromkeys(label[2:] for label in labels if label != "O")) if spans else labels
        pairs = tuple((" ".join(e["tokens"]), tags_as_text(e["tokens"], e["tags"])) for e in shown)
        for row in rows:
            text = " ".join(row["tokens"])
            yield Example(f"tasks/{name}", told, text, tags_as_text(row["tokens"], row["tags"]), names, pairs)
            if "intent" in row:
                asked = ("Name the intent of this command to a voice assistant.",)
                yield Example(f"tasks/{name}_intent", asked, text, row["intent"])
            if "tags_knowledge" in row:
                asked = (f"Find the tools and subjects that this sentence of a job advertisement asks for.{how}",)
                yield Example(
                    f"tasks/{name}_knowledge", asked, text, tags_as_text(row["tokens"], row["tags_knowledge"])
                )
        return
    pairs = tuple((e["input"], _answer(e["output"])) for e in shown)
    for row in rows:
        yield Example(f"tasks/{name}", (instruction,), row["input"], _answer(row["output"]), labels, pairs)
        if "rationale" in row:
            asked = ("Solve this word problem step by step. The last line is the answer.",)
            yield Example(f"tasks/{name}_steps", asked, row["input"], f"{row['rationale']}\nAnswer: {row['output']}")


def _instances(source: str, task: dict[str, Any], split: str | None = None) -> Iterator[Example]:
    """The instances of a file in the schema of Super-NaturalInstructions; the first of several accepted outputs."""
    pairs = tuple((e["input"], _answer(e["output"])) for e in task["Positive Examples"])
    for row in task["Instances"]:
        if split is None or row["split"] == split:
            yield Example(source, tuple(task["Definition"]), row["input"], row["output"][0], (), pairs)


def tags_as_text(tokens: Sequence[str], tags: Sequence[str]) -> str:
    """BIO tags as "slot = words; slot = words" or "none"; other tags as "word/TAG word/TAG"."""
    if not any(tag == "O" or tag[:2] in ("B-", "I-") for tag in tags):
        return " ".join(f"{token}/{tag}" for token, tag in zip(tokens, tags, strict=True))
    spans: list[tuple[str, list[str]]] = []
    before = "O"
    for token, tag in zip(tokens, tags, strict=True):
        if tag.startswith("I-") and before[2:] == tag[2:]:
            spans[-1][1].append(token)
        elif tag != "O":
            spans.append((tag[2:], [token]))
        before = tag
    return "; ".join(f"{slot} = {' '.join(value)}" for slot, value in spans) or "none"


def _answer(output: Any) -> str:
    return ", ".join(map(str, output)) if isinstance(output, list) else str(output)


def _input(row: dict[str, Any]) -> str:
    return row["input"] if "input" in row else " ".join(row["tokens"])


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


def clean(examples: Iterable[Example], held: HeldOut, dropped: Counter[str]) -> Iterator[Example]:
    """The examples without those that hold a held-out input; demonstrations that do are taken out."""
    for e in examples:
        if held.in_field(e.input, is_input=True) or held.in_field(e.output, is_input=False):
            dropped[f"{e.source} (field)"] += 1
        elif held.in_text(f"{e.input}\n{e.output}") or held.in_lines(f"{e.input}\n{e.output}"):
            dropped[f"{e.source} (text)"] += 1
        else:
            bad = [d for d in e.demonstrations if held.in_field(d[0], is_input=True) or held.in_text(" ".join(d))]
            kept = tuple(d for d in e.demonstrations if d not in bad)
            yield Example(e.source, e.instructions, e.input, e.output, e.labels, kept) if bad else e


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


def rendered(examples: Iterable[Example], seed: int = 0) -> Iterator[tuple[str, str, str, bool]]:
    """(source, prompt, answer, held for perplexity): VARIANTS surfaces of each example, one of a held one.

    Shots are drawn from the same task's examples that are trained on.
    """
    by_source: dict[str, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    for source, rows in by_source.items():
        held = [n % EVERY_EXAMPLE == EVERY_EXAMPLE // 2 for n in range(len(rows))]
        pool: list[Pair] = [(e.input, e.output) for e, out in zip(rows, held, strict=True) if not out]
        for number, (example, out) in enumerate(zip(rows, held, strict=True)):
            random = Random(f"{seed} {source} {number}")
            for _ in range(1 if out else VARIANTS):
                yield source, *render(example, pool, random), out


def build(data: Path, cache: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Write the cache; `limit` keeps that many documents of each text and examples of each task, to try it out."""
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

    examples = clean(_limited(read_examples(data), limit), held, dropped)
    for block in _blocks(_safe(rendered(examples), held, dropped), 2000):
        prompts = tokenizer.encode_batch_fast([prompt for _, prompt, _, _ in block])
        answers = tokenizer.encode_batch_fast([answer for _, _, answer, _ in block])
        for (source, prompt, answer, out), p, a in zip(block, prompts, answers, strict=True):
            size[source] += len((prompt + answer).encode())
            add(source, p.ids, a.ids, out)

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
    }
    _write(cache / "manifest.json", manifest)
    manifest["audit"] = audit(data, cache, held=held)
    _write(cache / "manifest.json", manifest)
    return manifest


def _safe(
    documents: Iterable[tuple[str, str, str, bool]], held: HeldOut, dropped: Counter[str]
) -> Iterator[tuple[str, str, str, bool]]:
    """Rendered documents without those in which a held-out input came about by putting the parts together."""
    for source, prompt, answer, out in documents:
        if held.in_document(prompt, answer):
            dropped[f"{source} (rendered)"] += 1
        else:
            yield source, prompt, answer, out


def _parent(name: str, known: dict[str, str]) -> str:
    """The task folder that a task made of its other columns comes from."""
    return next(other for other in known if name.startswith(f"{other}_"))


def _limited(examples: Iterable[Example], limit: int | None) -> Iterator[Example]:
    seen: Counter[str] = Counter()
    for example in examples:
        seen[example.source] += 1
        if limit is None or seen[example.source] <= limit:
            yield example


def _blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    block: list[Any] = []
    for item in items:
        block.append(item)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


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
