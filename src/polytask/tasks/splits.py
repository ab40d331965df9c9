"""Splits that a task does not bring: made once, from a seed, with duplicates kept together.

A held-out split gets a tenth of the rows; at least 30 of them, because fewer measure nothing (an accuracy of 80 % over
30 rows is known to about 14 points either way), but no more than a fifth of a small task; at most 2,000, because more
only slow down every evaluation. Below 5 rows nothing is held out.

Every row has its place from a hash of its text and the seed, not from its position: the order of the rows in the file
does not matter, and a few new rows move few old ones.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from polytask.tasks.task import SPLITS, Example, Kind

FRACTION, LEAST, MOST, SMALL = 10, 30, 2000, 5  # a tenth, bounds, and a fifth for small tasks


def holdout_size(n: int) -> int:
    """How many of `n` rows a made validation or test split gets."""
    return min(max(round(n / FRACTION), LEAST), n // SMALL, MOST)


def duplicate_key(example: Example) -> str:
    """What two examples share when they are the same input: the text without case and with single spaces."""
    return " ".join(example.text.casefold().split())


def make_splits(
    given: Mapping[str, Sequence[Example]], kind: Kind, *, seed: int = 0
) -> tuple[dict[str, tuple[Example, ...]], list[str]]:
    """`given` with the missing splits taken out of its `train`, and notes on what was made.

    Splits that are given stay as they are, but for the rows that leave `train`. Without a `train`, nothing is made.
    Classification is stratified by label (multilabel by the rarest label of a row): a label keeps at least one row, or
    one group of duplicates, in train; so a label seen once is in train only.
    """
    splits = {name: tuple(given.get(name, ())) for name in SPLITS}
    missing = [name for name in ("test", "validation") if not splits[name]]
    if not splits["train"] or not missing:
        return splits, []
    n = len(splits["train"])
    size = holdout_size(n)
    if size == 0:
        return splits, [f"no {' and no '.join(missing)} split: {n} rows are too few to hold any out"]

    strata = _strata(splits["train"], kind, seed)
    taken: dict[str, set[str]] = {}
    for name in missing:
        taken[name] = set()
        for label, count in _shares(strata, size, f"{seed} {name}").items():
            while count > 0 and len(strata[label]) > 1:
                key, rows = strata[label].pop()
                taken[name].add(key)
                count -= rows
    keys = [duplicate_key(example) for example in splits["train"]]
    for name in missing:
        splits[name] = tuple(e for e, key in zip(given["train"], keys, strict=True) if key in taken[name])
    held = set().union(*taken.values())
    splits["train"] = tuple(e for e, key in zip(given["train"], keys, strict=True) if key not in held)
    sizes = " and ".join(f"{name} ({len(splits[name])} rows)" for name in reversed(missing))
    how = ", stratified by label" if kind in ("classification", "multilabel") else ""
    return splits, [f"{sizes} made out of the {n} rows of train, seed {seed}{how}"]


def leaks(splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """Notes on inputs that stand in two splits: how many, and the ids of the first three."""
    keys = {name: {duplicate_key(e) for e in splits.get(name, ())} for name in SPLITS}
    notes = []
    for name, other in (("test", "train"), ("test", "validation"), ("validation", "train")):
        ids = [e.id for e in splits.get(name, ()) if duplicate_key(e) in keys[other]] if keys[other] else []
        if ids:
            share = f"{len(ids)} of {len(splits[name])} inputs" if len(ids) > 1 else "one input"
            notes.append(f"{share} of {name} also in {other}, which flatters scores; ids: {', '.join(ids[:3])}")
    return notes


def _strata(examples: Sequence[Example], kind: Kind, seed: int) -> dict[str, list[tuple[str, int]]]:
    """Groups of duplicates as (key, rows) for each label, in the order of a seeded hash."""
    counts = Counter(label for e in examples for label in _labels(e, kind))
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[duplicate_key(example)].append(example)
    strata: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for key, rows in groups.items():
        labels = {label for e in rows for label in _labels(e, kind)}
        strata[min(labels, key=lambda label: (counts[label], label), default="")].append((key, len(rows)))
    return {label: sorted(strata[label], key=lambda group: _hash(f"{seed} {group[0]}")) for label in sorted(strata)}


def _labels(example: Example, kind: Kind) -> tuple[str, ...]:
    if kind == "classification":
        return (str(example.output),)
    return example.output if kind == "multilabel" and isinstance(example.output, tuple) else ()


def _shares(strata: Mapping[str, Sequence[tuple[str, int]]], size: int, salt: str) -> dict[str, int]:
    """`size` rows shared out in proportion by largest remainders, so that the shares add up to `size`."""
    rows = {label: sum(count for _, count in groups) for label, groups in strata.items()}
    total = sum(rows.values())
    shares = {label: size * count // total for label, count in rows.items()}
    order = sorted(rows, key=lambda label: (-(size * rows[label] % total), _hash(f"{salt} {label}")))
    short = size - sum(shares.values())
    for label in [label for label in order if rows[label] - shares[label] > 1 and len(strata[label]) > 1][:short]:
        shares[label] += 1
    return shares


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
