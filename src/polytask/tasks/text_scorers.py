"""How well written answers fit: by characters, words, subsequences, n-grams, named values, numbers, or a passage.

Each answer counts by the best of its accepted references, and no answer (None) by nothing. ROUGE is rouge-score's and
BLEU and chrF are sacrebleu's, from the statistics that these libraries count; all values are shares from 0 to 1, so
sacrebleu's numbers stand divided by 100. Resamples are sums of an example's statistics: a corpus-level metric is
computed anew from each resample's sums, as sacrebleu's own bootstrap does.

Sources: SQuAD, Rajpurkar, Zhang, Lopyrev, Liang 2016 (arXiv 1606.05250); ROUGE, Lin 2004; ROUGE-L with Porter stems as
the metric of Super-NaturalInstructions, Wang et al. 2022 (arXiv 2204.07705); BLEU, Papineni et al. 2002, chrF, Popović
2015, both as in Post 2018 (arXiv 1804.08771); recall and K-precision, Adlakha et al. 2023 (arXiv 2307.16877); the final
number of an answer, Cobbe et al. 2021 (arXiv 2110.14168).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from polytask.errors import PolytaskError
from polytask.tasks.resampling import Floats, Measured, Resample, ratio
from polytask.tasks.structured import pair, parts, unescape
from polytask.tasks.task import Example, Task

PASSAGES = ("passage", "passages", "context", "knowledge", "evidence")
TOLERANCE = 1e-4  # relative; two whole numbers must be equal
_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"  # 18, -3.5, 1,234, 1e-7
)


def written(task: Task, predicted: Sequence[Any], examples: Sequence[Example], wanted: Sequence[str] = ()) -> Measured:
    """The metrics that cost little, and those of the `wanted` ones that cost more.

    Always: exact_match, squad_exact_match, token_f1, token_recall, and how long the answers are, since exact match and
    F1 punish a right answer for its length (Adlakha et al. 2023): `answer_words` for an answer, and `verbosity`, the
    answers' words for each word of their references. numeric_match where every reference is a number, k_precision
    where every example has a passage.
    """
    accepted = [tuple(map(str, e.output)) if isinstance(e.output, tuple) else (str(e.output),) for e in examples]
    answers = ["" if p is None else str(p) for p in predicted]
    given = np.array([p is not None for p in predicted], np.float64)
    values: dict[str, float] = {}
    resample: dict[str, Resample] = {}

    def enter(name: str, over: Any, under: Any = None) -> None:
        under = np.ones(len(examples)) if under is None else under
        resample[name] = ratio(over, under)
        values[name] = float(resample[name](np.ones((1, len(examples))))[0])

    def best(of: Callable[[str, str], float]) -> Floats:
        return given * [max(of(a, r) for r in refs) for a, refs in zip(answers, accepted, strict=True)]

    enter("exact_match", best(exact_match))
    enter("squad_exact_match", best(squad_exact_match))
    enter("token_f1", best(token_f1))
    enter("token_recall", best(token_recall))
    words = [len(a.split()) for a in answers]
    enter("answer_words", words)
    enter("verbosity", words, [np.mean([len(r.split()) for r in refs]) for refs in accepted])

    if "numeric_match" in wanted or all(_NUMBER.fullmatch(r.strip()) for refs in accepted for r in refs):
        enter("numeric_match", best(numeric_match))
    passages = [passage(e) for e in examples]
    if None not in passages:
        enter("k_precision", [k_precision(a, p or "") for a, p in zip(answers, passages, strict=True)])
    elif "k_precision" in wanted:
        without = examples[passages.index(None)].id
        raise PolytaskError(
            f"example {without!r} has no passage for k_precision; give each a field {', '.join(PASSAGES[:-1])} or "
            f"{PASSAGES[-1]}, or the passage as the second text"
        )
    if "slot_f1" in wanted:
        counts = np.array([_slot_counts(a, refs) for a, refs in zip(answers, accepted, strict=True)])
        enter("slot_f1", 2 * counts[:, 0], counts[:, 1] + counts[:, 2])
    if "rouge_l" in wanted:
        enter("rouge_l", _rouge_l(answers, accepted, task.language))
    for name in ("bleu", "chrf"):
        if name in wanted:
            values[name], resample[name] = _corpus(name, answers, accepted)
    return values, resample


def exact_match(answer: str, reference: str) -> float:
    """1 where both are equal up to white space; case, articles and punctuation count."""
    return float(answer.split() == reference.split())


def squad_exact_match(answer: str, reference: str) -> float:
    """1 where both have the same words, in order, once SQuAD's normalisation has gone over them."""
    return float(squad_words(answer) == squad_words(reference))


def token_f1(answer: str, reference: str) -> float:
    """F1 of the two bags of words after SQuAD's normalisation; where one is empty, 1 if both are (SQuAD 2.0)."""
    a, r = squad_words(answer), squad_words(reference)
    if not a or not r:
        return float(a == r)
    return 2 * _shared(a, r) / (len(a) + len(r))


def token_recall(answer: str, reference: str) -> float:
    """The share of the reference's words that are in the answer: |A ∩ R| / |R| over bags of words; 1 for no words.

    Adlakha et al. 2023: of the lexical metrics, the one that goes with people's judgement of correctness, since what
    a wordy answer says beside the reference does not count.
    """
    r = squad_words(reference)
    return _shared(squad_words(answer), r) / len(r) if r else 1.0


def k_precision(answer: str, passage: str) -> float:
    """The share of the answer's words that are in the passage: |A ∩ K| / |A| over bags of words; 0 for no words.

    Adlakha et al. 2023: of the lexical metrics, the one that goes with people's judgement of faithfulness.
    """
    a = squad_words(answer)
    return _shared(a, squad_words(passage)) / len(a) if a else 0.0


def numeric_match(answer: str, reference: str) -> float:
    """1 where the last number of the answer is that of the reference: "… so she pays $1,234.50." and "1234.5".

    Whole numbers must be equal, others within TOLERANCE. A reference without a number is matched as a text.
    """
    a, r = numbers(answer), numbers(reference)
    if not a or not r:
        return float(not r and exact_match(answer, reference))
    if not re.search(r"[.eE]", a[-1] + r[-1]):
        return float(Decimal(a[-1]) == Decimal(r[-1]))
    return float(math.isclose(float(a[-1]), float(r[-1]), rel_tol=TOLERANCE))


def numbers(text: str) -> list[str]:
    """The numbers of a text as `float` reads them; a hyphen after a letter or a digit is no minus."""
    return [n.replace(",", "").replace("−", "-") for n in _NUMBER.findall(text)]


def slots(text: str) -> Counter[tuple[str, str]]:
    """The (slot, value) pairs of "slot = value; slot = value" or "slot: value; …", without case or extra space.

    A part without a name (the intent in "BookRestaurant; city = Rome") is a pair with the name "". "none" is no pair.
    """
    if text.strip().casefold() in ("", "none"):
        return Counter()
    pairs = (map(unescape, pair(part)) for part in parts(text))
    return Counter((_plain(name), _plain(value)) for name, value in pairs)


def squad_words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, ASCII punctuation deleted, then a, an and the; the words that are left."""
    bare = text.lower().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def passage(example: Example) -> str | None:
    """What the answer must be grounded in: the example's field of one of the PASSAGES, or its second text."""
    for name in PASSAGES:
        value = example.extra.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list | tuple) and value and all(isinstance(part, str) for part in value):
            return " ".join(value)
    return example.pair


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _shared(a: list[str], b: list[str]) -> int:
    return sum((Counter(a) & Counter(b)).values())


def _slot_counts(answer: str, references: tuple[str, ...]) -> tuple[int, int, int]:
    """Right, predicted and true pairs, by the reference with the best F1."""
    guess = slots(answer)
    counts = []
    for reference in references:
        gold = slots(reference)
        counts.append(((guess & gold).total(), guess.total(), gold.total()))
    return max(counts, key=lambda c: 2 * c[0] / (c[1] + c[2]) if c[1] + c[2] else 1.0)


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


def _rouge_l(answers: Sequence[str], accepted: Sequence[tuple[str, ...]], language: str) -> Floats:
    """ROUGE-L F of each answer; words are Porter stems of a-z and 0-9 in English, and what spaces divide elsewhere."""
    from rouge_score.rouge_scorer import RougeScorer

    english = not language or re.match(r"en\b|eng\b|english\b", language.casefold())
    scorer = RougeScorer(["rougeL"], use_stemmer=True) if english else RougeScorer(["rougeL"], tokenizer=_Words())
    scored = (scorer.score_multi(refs, answer) for answer, refs in zip(answers, accepted, strict=True))
    return np.array([s["rougeL"].fmeasure for s in scored], np.float64)


def _corpus(name: str, answers: Sequence[str], accepted: Sequence[tuple[str, ...]]) -> tuple[float, Resample]:
    """Corpus BLEU (13a tokens, exponential smoothing) or chrF2 (6 characters, no words): sacrebleu's defaults."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    metric = BLEU(force=True) if name == "bleu" else CHRF()
    most = max(map(len, accepted))
    streams = [[refs[n] if n < len(refs) else None for refs in accepted] for n in range(most)]
    # Not public, but what sacrebleu's own significance tests are made of.
    counts = np.array(metric._extract_corpus_statistics(answers, streams), np.float64)  # type: ignore[arg-type]

    def resample(w: Floats) -> Floats:
        sums = (w @ counts).round().astype(np.int64).tolist()
        return np.array([metric._compute_score_from_stats(row).score / 100 for row in sums])

    return float(resample(np.ones((1, len(answers))))[0]), resample
