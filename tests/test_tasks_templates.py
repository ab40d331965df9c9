"""Prompts are written exactly as their docstrings say, and what a template wrote, `parse` reads back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.errors import PolytaskError, UsageError
from polytask.tasks import Example, Label, Task
from polytask.tasks.scorers import score
from polytask.tasks.task import Kind
from polytask.tasks.templates import TEMPLATES, Chat, Plain, SuperNI, Template, parse, render, template, templates

FORMS = ["plain", "superni", "chat", Plain(letters=True)]
MOOD = Task(
    "mood",
    "classification",
    train=tuple(Example(f"t{n}", f"text {n}", "glad" if n % 2 else "sad") for n in range(20)),
    instruction="Say the mood.",
    labels=(Label("glad", "feels good"), Label("sad")),
    demonstrations=(Example("d1", "Hurray!", "glad", extra={"explanation": "a cheer"}), Example("d2", "Alas", "sad")),
    negatives=(Example("n1", "Oh no", "glad", extra={"explanation": "it is sad"}),),
)
ASKED = Example("q", " What a day ", "glad")


# -- formats -----------------------------------------------------------------------------------------------------------


def test_plain() -> None:
    p = render(MOOD, ASKED, demonstrations=2)
    assert p.text == (
        "Say the mood.\n\nLabels:\n- glad: feels good\n- sad\n\n"
        "Input: Hurray!\nOutput: glad\n\nInput: Alas\nOutput: sad\n\nInput: What a day\nOutput:"
    )
    assert (p.answer, p.target) == ("glad", " glad")
    assert p.messages == [{"role": "user", "content": p.text}]
    assert render(replace(MOOD, instruction=""), ASKED, Plain(labels=False)).text == "Input: What a day\nOutput:"


def test_superni_as_the_papers_collator_writes_it() -> None:
    bare = Task("t", "generation", instruction="Add one")
    p = render(bare, Example("1", "4", "5"), "superni")
    # The collator's text ends in the space; here it goes with the answer, in whose first token tokenizers have it.
    assert p.text == "Definition: Add one.\n\nNow complete the following example -\nInput: 4.\nOutput:"
    assert (p.lead, p.answer, p.target) == (" ", "5", " 5")
    p = render(MOOD, ASKED, SuperNI(negatives=1, explanations=True), demonstrations=1)
    assert p.text == (
        "Definition: Say the mood.\n\n"
        " Positive Example 1 -\nInput: Hurray!\n Output: glad.\n Explanation: a cheer.\n\n"
        " Negative Example 1 -\nInput: Oh no.\n Output: glad.\n Explanation: it is sad.\n\n"
        "Now complete the following example -\nInput: What a day.\nOutput:"
    )
    assert p.target == " glad"
    two = render(MOOD, ASKED, "superni", demonstrations=2).text
    assert " Positive Example 2 -\nInput: Alas.\n Output: sad.\n\nNow complete" in two
    assert "Explanation" not in two
    assert "Negative" not in two


def test_chat() -> None:
    about = "Say the mood.\n\nLabels:\n- glad: feels good\n- sad"
    p = render(MOOD, ASKED, "chat", demonstrations=1)
    assert p.messages == [
        {"role": "system", "content": about},
        {"role": "user", "content": "Hurray!"},
        {"role": "assistant", "content": "glad"},
        {"role": "user", "content": "What a day"},
    ]
    assert p.text == f"{about}\n\nHurray!\n\nglad\n\nWhat a day"
    without = render(MOOD, ASKED, Chat(system=False), demonstrations=1).messages
    assert [turn["role"] for turn in without] == ["user", "assistant", "user"]
    assert without[0]["content"] == f"{about}\n\nHurray!"


def test_inputs_and_hints_of_the_kinds() -> None:
    pair = Task("t", "similarity", train=(Example("1", "a", 4.5, pair="b"),))
    p = render(pair, pair.train[0])
    assert (p.text, p.answer) == ("Input: Text 1: a\nText 2: b\nOutput:", "4.5")
    choice = Task("t", "choice")
    e = Example("1", "Capital of Italy?", "Rome", extra={"options": ("Bonn", "Rome")})
    assert render(choice, e).text == "Input: Capital of Italy?\nOptions:\n(A) Bonn\n(B) Rome\nOutput:"
    assert (render(choice, e).answer, render(choice, e, Plain(letters=True)).answer) == ("Rome", "B")
    many = Task("t", "multilabel", labels=(Label("joy"), Label("none")))
    assert 'Labels (as many as fit, "; " between them, or "nothing"):\n- joy\n' in render(many, ASKED).text
    e = Example("1", ("to", "New", "York"), ("O", "B-city", "I-city"))
    tags = Task("t", "tagging", train=(e,), labels=(Label("city", "a town"),))
    assert render(tags, e).text == (
        'Labels (write "label: words" for each span in order, "; " between them, or "none"):\n- city: a town\n\n'
        "Input: to New York\nOutput:"
    )
    assert render(tags, e).answer == "city: New York"
    assert render(Task("t", "generation"), Example("1", "x", (" one\n", "two"))).answer == "one"
    unknown = render(MOOD, Example("u", "x"))
    assert (unknown.answer, unknown.target) == (None, " ")


def test_demonstrations() -> None:
    shown = lambda e, k, **more: render(MOOD, e, "chat", demonstrations=k, **more).messages[1:-1:2]  # noqa: E731
    texts = lambda e, k, **more: [turn["content"] for turn in shown(e, k, **more)]  # noqa: E731
    whole = texts(ASKED, 99)
    assert whole[:2] == ["Hurray!", "Alas"]
    assert sorted(whole[2:]) == sorted(e.text for e in MOOD.train)
    assert whole[2:] != [e.text for e in MOOD.train]
    assert texts(ASKED, 7) == whole[:7]  # prompts share their beginning
    assert texts(ASKED, 7, seed=1) != whole[:7]
    mine = next(e for e in MOOD.train if e.text == whole[3])
    assert texts(mine, 21) == [text for text in whole if text != mine.text]
    assert texts(Example("other", "Hurray!", "sad"), 2) == ["Alas", whole[2]]
    unlabelled = replace(MOOD, demonstrations=(Example("d", "no output"), Example("e", "twice", "sad")) * 2, train=())
    assert [m["content"] for m in render(unlabelled, ASKED, "chat", demonstrations=3).messages[1:]] == [
        *("twice", "sad", "What a day")
    ]


def test_registry() -> None:
    assert list(templates()) == ["chat", "plain", "superni"]
    assert all(form.__doc__ for form in templates().values())
    with pytest.raises(UsageError, match="no template 'alpaca'; the templates are chat, plain, superni"):
        render(MOOD, ASKED, "alpaca")
    try:

        @template("shout")
        class Shout(Plain):
            mark: str = "!"

            def answer(self, task: Task, example: Example) -> str:
                return super().answer(task, example).upper() + self.mark

        assert render(MOOD, ASKED, "shout").answer == "GLAD!"
        assert parse(MOOD, "GLAD!", ASKED, "shout") == "glad"
        assert Shout(mark="?") == Shout(mark="?")
    finally:
        del TEMPLATES["shout"]


def test_refusals() -> None:
    with pytest.raises(UsageError, match="retrieval"):
        render(Task("t", "retrieval"), ASKED)
    with pytest.raises(UsageError, match="a tagging answer is read with its example"):
        parse(Task("t", "tagging"), "none")
    with pytest.raises(PolytaskError, match="example 'q' has no options"):
        render(Task("t", "choice"), ASKED)


def test_negative_examples_are_read(tmp_path: Path) -> None:
    shown = [{"input": "p", "output": "q"}]
    wrong = [{"input": "n", "output": "m", "explanation": "no q"}, {"input": "n", "output": " "}]
    rows = [{"id": str(n), "input": f"in {n}", "output": [f"a longer answer {n}"]} for n in range(20)]
    suite = {"Definition": ["Do."], "Positive Examples": shown, "Negative Examples": wrong, "Instances": rows}
    (tmp_path / "t.json").write_text(json.dumps(suite))
    task = Task.read(tmp_path / "t.json")
    assert "not kept: 1 negative examples, which are no generation examples" in task.notes
    text = render(task, ASKED, SuperNI(negatives=2, explanations=True), demonstrations=1).text
    assert text.startswith(
        "Definition: Do.\n\n Positive Example 1 -\nInput: p.\n Output: q.\n\n"
        " Negative Example 1 -\nInput: n.\n Output: m.\n Explanation: no q.\n\nNow complete"
    )
    card = {"name": "t", "kind": "generation", "positive_examples": shown, "negative_examples": wrong[:1]}
    (tmp_path / "task.json").write_text(json.dumps(card))
    (tmp_path / "t.json").unlink()
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({**r, "output": "x y"}) + "\n" for r in rows))
    task = Task.read(tmp_path)
    assert [(e.input, e.output) for e in (*task.demonstrations, *task.negatives)] == [("p", "q"), ("n", "m")]


# -- there and back ----------------------------------------------------------------------------------------------------

# Letters that the formats give a meaning to, and some that they do not.
text = st.text("aB1 ;:=\\#\n,.|-_()é", min_size=1, max_size=8).filter(lambda t: t.strip() != "")
name = text.map(lambda t: " ".join(t.split()))
names = st.lists(name, min_size=1, max_size=4, unique=True)


def back(t: Task, e: Example, form: str | Template) -> Any:
    p = render(t, e, form, demonstrations=1)
    assert p.answer is not None
    assert parse(t, p.answer, e, form) == parse(t, f" {p.answer}\n", e, form)
    return parse(t, p.answer, e, form)


@settings(max_examples=150, deadline=None)
@given(names, st.data())
def test_labels_there_and_back(labels: list[str], data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMS))
    one = Example("1", "x", data.draw(st.sampled_from(labels)))
    assert back(Task("t", "classification", labels=tuple(map(Label, labels))), one, form) == one.output
    several = Example("1", "x", tuple(data.draw(st.lists(st.sampled_from(labels), unique=True))))
    assert back(Task("t", "multilabel", labels=tuple(map(Label, labels))), several, form) == several.output


def test_a_label_called_none() -> None:
    t = Task("t", "multilabel", labels=(Label("None"), Label("nothing"), Label("none 0")))
    for output in ((), ("None",), ("nothing", "None")):
        assert back(t, Example("1", "x", output), "plain") == output


@settings(max_examples=100, deadline=None)
@given(names, st.data())
def test_options_there_and_back(options: list[str], data: st.DataObject) -> None:
    e = Example("1", "x", data.draw(st.sampled_from(options)), extra={"options": tuple(options)})
    assert back(Task("t", "choice"), e, data.draw(st.sampled_from(FORMS))) == e.output


def test_options_that_are_letters_and_more_than_26() -> None:
    options = tuple("BA") + tuple(f"option {n}" for n in range(40))
    for option in options:
        e = Example("1", "x", option, extra={"options": options})
        for form in (Plain(), Plain(letters=True)):
            assert back(Task("t", "choice"), e, form) == option


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(FORMS))
@case(1e16, "plain")
@case(-3.0, "plain")
@case(5e-324, "superni")
def test_numbers_there_and_back(number: float, form: str | Template) -> None:
    kinds: tuple[Kind, ...] = ("regression", "similarity")
    for kind in kinds:
        assert back(Task("t", kind), Example("1", "x", number), form) == number


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1).filter(lambda t: t.strip() != ""), st.sampled_from(FORMS))
def test_texts_there_and_back(output: str, form: str | Template) -> None:
    assert back(Task("t", "generation"), Example("1", "x", output), form) == output.strip()


@st.composite
def bio(draw: st.DrawFn) -> tuple[list[str], Example]:
    labels = draw(names)
    token = st.sampled_from(["a", "b", "#2", ";", "\\", "a b", "x:", "None", "é\n="])
    tokens, tags = draw(st.lists(token, min_size=1, max_size=9)), ["B-" + labels[0]]
    for _ in tokens[1:]:
        before = tags[-1]
        tags.append(draw(st.sampled_from(["O", *(f"B-{n}" for n in labels), *([f"I-{before[2:]}"] * 3)[: 3 * (before != "O")]])))  # fmt: skip # noqa: E501
    return labels, Example("1", tuple(tokens), tuple(tags))


@settings(max_examples=300, deadline=None)
@given(bio(), st.sampled_from(FORMS))
def test_spans_there_and_back(made: tuple[list[str], Example], form: str | Template) -> None:
    labels, e = made
    t = Task("t", "tagging", train=(e,), labels=tuple(map(Label, labels)))
    assert back(t, e, form) == e.output
    empty = Example("2", e.input, ("O",) * len(e.input))
    assert back(t, empty, form) == empty.output


@settings(max_examples=100, deadline=None)
@given(st.lists(name, min_size=1, max_size=6), st.sampled_from(FORMS))
def test_plain_tags_there_and_back(tags: list[str], form: str | Template) -> None:
    tags = [f"T{tag}" for tag in tags]
    e = Example("1", tuple("w" * len(tags)), tuple(tags))
    t = Task("t", "tagging", train=(e,), labels=tuple(map(Label, sorted(set(tags)))))
    assert back(t, e, form) == e.output


# -- what models write -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("card_arrival", "card_arrival"),
        (" Card arrival.\n", "card_arrival"),
        ('"card-arrival"', "card_arrival"),
        ("card arrival, since it is late", "card_arrival"),
        ("card", "card"),
        ("card arrival time", "card arrival time"),
        ("cards", "cards"),  # no label, and so wrong
        ("exch", "exchange"),  # cut off by a limit of tokens
        ("", ""),
        ("ca", "ca"),  # three labels begin like this
    ],
)
def test_labels_as_models_write_them(said: str, label: str) -> None:
    names = ("card", "card_arrival", "card arrival time", "exchange")
    t = Task("t", "classification", labels=tuple(map(Label, names)))
    assert parse(t, said) == label
    assert parse(replace(t, kind="multilabel"), said) == ((label,) if label else ())


def test_options_as_models_write_them() -> None:
    e = Example("1", "x", "Rome", extra={"options": ("a cat", "Rome")})
    for said in ("B", "(B)", "b.", "(b) Rome", "B: Rome", "rome", "Rome it is", "B\n\nInput"):
        for form in (Plain(), Plain(letters=True)):
            assert parse(Task("t", "choice"), said, e, form) == "Rome"
    assert parse(Task("t", "choice"), "A dog", e) == "A dog"
    assert parse(Task("t", "choice"), "C", e) == "C"


def test_spans_as_models_write_them() -> None:
    e = Example("1", ("fly", "from", "Rome", "to", "New", "York", "or", "Rome"), ("O",) * 8)
    train = (Example("t", ("x", "y"), ("B-city", "B-from")),)
    t = Task("t", "tagging", train=train, labels=(Label("city"), Label("from")))
    read = lambda said: " ".join(parse(t, said, e))  # type: ignore[arg-type] # noqa: E731
    assert read("city: New York; city: Rome") == "O O O O B-city I-city O B-city"  # in order: the second Rome
    assert read("city: Rome; from: Rome") == "O O B-city O O O O B-from"
    assert read("city: Rome #2") == "O O O O O O O B-city"
    assert read("From = new york.; city = Oslo; FROM: rome") == "O O B-from O O O O O"
    assert read("city: New York; city: fly; from: Rome") == "B-city O O O B-city I-city O B-from"
    assert read("from: new york") == "O O O O B-from I-from O O"
    assert read("via: Rome; nonsense;; :") == "O O B-via O O O O O"
    assert read("none") == "O O O O O O O O"


def test_a_span_without_its_beginning() -> None:
    e = Example("1", ("in", "New", "York", "now"), ("O", "I-city", "I-city", "I-date"))
    t = Task("t", "tagging", train=(e,), labels=(Label("city"), Label("date")))
    assert render(t, e).answer == "city: New York; date: now"
    assert back(t, e, "plain") == ("O", "B-city", "I-city", "B-date")  # the same spans


def test_plain_tags_too_few_and_too_many() -> None:
    t = Task("t", "tagging", train=(Example("1", ("a",), ("NOUN",)),), labels=(Label("NOUN"), Label("VERB")))
    e = Example("2", ("a", "b", "c"), ("NOUN", "VERB", "NOUN"))
    assert parse(t, "noun VERB", e) == ("NOUN", "VERB", "")
    assert parse(t, "NOUN what NOUN VERB", e) == ("NOUN", "what", "NOUN")


def test_what_is_no_output_scores_as_wrong() -> None:
    answers = [parse(MOOD, said, ASKED) for said in ("happy", "glad!", "")]
    rows = [Example(str(n), "x", "glad") for n in range(3)]
    assert score(replace(MOOD, metric="accuracy"), answers, rows).value == 1 / 3
    assert parse(Task("t", "regression"), "about 4.5 of 5") == 4.5
    assert parse(Task("t", "regression"), " much ") == "much"
