"""Constrained decoding: whatever is chosen among the allowed tokens, the answer satisfies its constraint."""

from __future__ import annotations

import json
import random
import re
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from polytask.errors import PolytaskError, UsageError
from polytask.inference.decoding import Constraint, Guides

TEXTS = [
    'yes no maybe the cat sat on the category mat, café 日本 {"team": "billing", "urgent": true} [1, 2, 3] null',
    "yes, yesterday: no; nothing (cat) 0.5 + 7 * 8 - 96 = hello world 日本語 cafés false",
] * 20
PADDING = 7  # logits are often wider than the tokenizer
BYTE = {character: value for value, character in bytes_to_unicode().items()}


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and the project's own decoder have it; and a token that was added as a word."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|user|>"], pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_tokens(["yesterday no"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=special[0], additional_special_tokens=special[1:])


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma have it: "▁" for a space, tokens for single bytes, a space put before every text."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>"]
    values = [f"<0x{value:02X}>" for value in range(256)]
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=special + values, show_progress=False)
    )
    state = json.loads(made.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    made = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    """As T5 has it: "▁" for a space, no bytes, so that a character which it never saw cannot be written."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(vocab_size=160, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback(), "unigram": unigram()}
GUIDES = {name: Guides(made, len(made) + PADDING) for name, made in TOKENIZERS.items()}
every = pytest.mark.parametrize("name", TOKENIZERS)
with_bytes = pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])


def spelled(name: str) -> list[bytes | None]:
    """Each token's bytes, read from its name; None for a special token."""
    made = TOKENIZERS[name]
    pieces: list[bytes | None] = []
    for token in range(len(made)):
        text = made.convert_ids_to_tokens(token)
        if token in made.all_special_ids:
            pieces.append(None)
        elif text in made.get_added_vocab():
            pieces.append(text.encode())
        elif name == "byte-level":
            pieces.append(bytes(BYTE[character] for character in text))
        elif re.fullmatch("<0x..>", text):
            pieces.append(bytes([int(text[3:5], 16)]))
        else:
            pieces.append(text.replace("▁", " ").encode())
    return pieces


SPELLED = {name: spelled(name) for name in TOKENIZERS}


def walk(name: str, constraint: Constraint, seed: int, lead: str = "", most: int = 500) -> str:
    """The text after `lead` of a random walk over allowed tokens. The end is allowed exactly where `check` says yes."""
    draw, guide, data = random.Random(seed), GUIDES[name].open(constraint, lead), b""
    end = TOKENIZERS[name].eos_token_id
    for _ in range(most):
        tokens = guide.allowed().nonzero().flatten().tolist()
        text = data.decode(errors="surrogateescape")
        assert (end in tokens) == (text.startswith(lead) and fits(constraint, text.removeprefix(lead)))
        assert guide.done == (tokens == [end])
        token = draw.choice(tokens)
        guide.accept(token)
        if token == end:
            assert guide.done
            assert guide.forced() == []
            return text.removeprefix(lead)
        data += SPELLED[name][token] or b""
    raise AssertionError(f"no end: {data!r}")


def fits(constraint: Constraint, text: str) -> bool:
    try:
        constraint.check(text)
    except PolytaskError as error:
        return bool("\n" in str(error))  # a message of two lines would count as a yes
    return True


def brute(name: str, wholes: list[bytes], data: bytes) -> list[int]:
    """The tokens that may follow `data` on the way to one of `wholes`, by trying each."""
    tokens = [
        token
        for token, piece in enumerate(SPELLED[name])
        if piece is not None and any(whole.startswith(data + piece) for whole in wholes)
    ]
    return sorted(tokens + [TOKENIZERS[name].eos_token_id] * (data in wholes))


# -- choices ---------------------------------------------------------------------------------------------------------

OPTIONS = ["cat", "category", "café", "yes", "yesterday", "yes no", "日本", "日本語", "no"]


@every
@pytest.mark.parametrize("lead", ["", " ", "hello: "])
def test_masks_of_a_choice_are_those_of_trying_every_token(name: str, lead: str) -> None:
    wholes = [(lead + option).encode() for option in OPTIONS]
    ways: dict[bytes, list[int]] = {b"": []}
    todo = [b""]
    while todo:  # every text that can stand at a token's end
        data = todo.pop()
        guide = GUIDES[name].open(Constraint.choice(OPTIONS), lead)
        for token in ways[data]:
            guide.accept(token)
        mask, right = guide.allowed(), brute(name, wholes, data)
        assert mask.dtype == torch.bool
        assert mask.shape == (len(TOKENIZERS[name]) + PADDING,)
        assert mask.nonzero().flatten().tolist() == right
        for token in right:
            longer = data + (SPELLED[name][token] or b"")
            if longer not in ways:
                ways[longer] = [*ways[data], token]
                todo.append(longer)
    assert set(wholes) <= set(ways)
    assert len(ways) > 30 - 10 * (name == "unigram")


@with_bytes
@settings(max_examples=40, deadline=None)
@given(
    options=st.lists(st.text(max_size=6) | st.sampled_from(OPTIONS), min_size=1, max_size=6),
    cut=st.integers(0, 4),
    lead=st.sampled_from(["", " ", "\n", "A: ", "é"]),
    seed=st.integers(0, 2**32),
)
def test_any_choice_comes_out_as_it_is(name: str, options: list[str], cut: int, lead: str, seed: int) -> None:
    options = [*options, options[0][:cut]]  # and the beginning of one of them
    constraint = Constraint.choice(options)
    assert walk(name, constraint, seed, lead) in options
    ends = TOKENIZERS[name].eos_token_id
    for option in options:  # byte by byte
        guide = GUIDES[name].open(constraint, lead)
        for value in (lead + option).encode():
            guide.accept(SPELLED[name].index(bytes([value])))
        assert guide.allowed()[ends]


@every
def test_the_tokenizers_own_tokens_are_a_way(name: str) -> None:
    """`lead` is there for this: with a space before it, a word is the token that the model knows."""
    made = TOKENIZERS[name]
    for option in ["yes", "category", "yes no"]:
        guide = GUIDES[name].open(Constraint.choice(OPTIONS), " ")
        text = f" {option}" if name == "byte-level" else option  # the others put a space before any text
        for token in made.encode(text, add_special_tokens=False):
            assert guide.allowed()[token]
            guide.accept(token)
        assert guide.allowed()[made.eos_token_id]


def test_a_space_may_come_alone_or_with_its_word() -> None:
    piece = SPELLED["byte-level"].index
    for way in ([b" yes"], [b" ", b"yes"], [b" ", b"y", b"e", b"s"]):
        guide = GUIDES["byte-level"].open(Constraint.choice(["yes", "no"]), " ")
        for token in map(piece, way):
            assert guide.allowed()[token]
            guide.accept(token)
        assert guide.done


def test_a_choice_of_nothing_but_silence() -> None:
    guide = GUIDES["byte-level"].open(Constraint.choice([""]))
    assert guide.allowed().nonzero().tolist() == [[0]]
    guide.accept(0)
    assert guide.done


def test_thousands_of_options() -> None:
    draw = random.Random(0)
    options = ["".join(draw.choices("abcdefgh ij", k=draw.randint(3, 20))) for _ in range(3000)]
    for seed in range(5):
        assert walk("byte-level", Constraint.choice(options), seed) in options


# -- regexes, schemas, grammars --------------------------------------------------------------------------------------

REGEXES = [
    r"[0-9]{4}-[01][0-9]-[0-3][0-9]",
    r"(?:yes|no)(?:, (?:yes|no)){0,3}",
    r"[a-z]{1,8}@[a-z]{1,8}\.(?:com|org)",
    r"(?i)cat(?:egory)?",
    r"[^\x00-\x7f]{1,4}",
    r"a/b\\c\n{0,2}",
    r"",
]
TICKET: dict[str, Any] = {
    "type": "object",
    "properties": {
        "team": {"enum": ["billing", "café", "日本", 7, None]},
        "urgent": {"type": "boolean"},
        "who": {
            "type": "object",
            "properties": {"age": {"type": "integer", "minimum": -5, "maximum": 120}, "name": {"const": "cat"}},
            "required": ["age"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 3},
    },
    "required": ["team", "who", "tags"],
    "additionalProperties": False,
}
SCHEMAS: list[Any] = [
    TICKET,
    {"type": "integer", "minimum": 10, "maximum": 1234},
    {"type": "array", "prefixItems": [{"const": "yes"}, {"type": "null"}], "items": False, "minItems": 2},
    {"anyOf": [{"type": "string", "pattern": "^[a-c]{2}$"}, {"type": "boolean"}]},
    {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 1}}, "$ref": "#/$defs/t"},
]
SUM = r"""
start: term (("+" | "-") term){0,3}
term: NUMBER | "(" NUMBER "*" NUMBER ")"
NUMBER: /[1-9][0-9]?/
%ignore / /
"""


@with_bytes
@pytest.mark.parametrize("lead", ["", " "])
@pytest.mark.parametrize("pattern", REGEXES)
def test_walks_match_their_regex(name: str, lead: str, pattern: str) -> None:
    found = {walk(name, Constraint.regex(pattern), seed, lead) for seed in range(8)}
    assert all(re.fullmatch(pattern, text) for text in found)
    assert len(found) > 1 or not pattern


@with_bytes
@pytest.mark.parametrize("lead", ["", " "])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_walks_are_in_their_json_schema(name: str, lead: str, schema: Any) -> None:
    constraint = Constraint.json(schema)
    for seed in range(8):
        text = walk_json(name, constraint, seed, lead)
        json.loads(text)
        constraint.check(text)


def walk_json(name: str, constraint: Constraint, seed: int, lead: str) -> str:
    """As `walk`, where `check` says yes to more spaces and orders than the masks let through."""
    draw, guide, data = random.Random(seed), GUIDES[name].open(constraint, lead), b""
    while True:
        tokens = guide.allowed().nonzero().flatten().tolist()
        token = draw.choice(tokens)
        if token == TOKENIZERS[name].eos_token_id:
            return data.decode().removeprefix(lead)
        guide.accept(token)
        data += SPELLED[name][token] or b""


@every
@pytest.mark.parametrize("lead", ["", " "])
def test_walks_derive_from_their_grammar(name: str, lead: str) -> None:
    constraint = Constraint.grammar(SUM)
    for seed in range(8):
        text = walk(name, constraint, seed, lead)
        assert eval(text) is not None  # Python reads such sums too


def test_json_is_on_one_line_as_python_writes_it_or_without_spaces() -> None:
    value = {"team": "billing", "who": {"age": 3}, "tags": ["a"]}
    made, constraint = TOKENIZERS["byte-level"], Constraint.json(TICKET)
    for text in (json.dumps(value), json.dumps(value, separators=(",", ":"))):
        guide = GUIDES["byte-level"].open(constraint)
        for token in made.encode(text):
            guide.accept(token)
        assert guide.done
    guide = GUIDES["byte-level"].open(constraint)
    guide.accept(made.encode("{")[0])
    assert not guide.allowed()[made.encode("\n")[0]]
    constraint.check(json.dumps(value, indent=2))
    wide = Constraint.json({"x-guidance": {"whitespace_flexible": True}, **TICKET})
    guide = GUIDES["byte-level"].open(wide)
    guide.accept(made.encode("{")[0])
    assert guide.allowed()[made.encode("\n")[0]]


@every
def test_forced_tokens_are_the_only_text_on(name: str) -> None:
    constraint = Constraint.choice(["yes no maybe", "yes no nothing", "the category"])
    guide, spell = GUIDES[name].open(constraint, " "), SPELLED[name]
    guide.accept(spell.index(b" "))
    assert guide.forced() == []  # y or t
    guide.accept(spell.index(b"y"))
    before, tokens = guide.allowed(), guide.forced()
    assert guide.allowed().equal(before)  # to ask changes nothing
    assert tokens
    for token in tokens:
        assert guide.allowed()[token]
        guide.accept(token)
    assert "yes no ".startswith("y" + b"".join(spell[token] or b"" for token in tokens).decode())
    for options, text in ((["yes no maybe"], "yes no maybe"), (["cat", "category"], "cat")):
        guide, data = GUIDES[name].open(Constraint.choice(options)), b""
        while tokens := guide.forced():
            for token in tokens:
                guide.accept(token)
                data += spell[token] or b""
        assert text.startswith(data.decode())  # no further than where the answer may end
        assert guide.done == (len(options) == 1)


def test_one_row_does_not_disturb_another() -> None:
    constraint = Constraint.choice(["yes", "no"])
    one, other = (GUIDES["byte-level"].open(constraint) for _ in range(2))
    one.accept(SPELLED["byte-level"].index(b"n"))
    assert other.allowed()[SPELLED["byte-level"].index(b"y")]
    assert not one.allowed()[SPELLED["byte-level"].index(b"y")]


def test_equal_constraints_are_one() -> None:
    assert Constraint.json(TICKET) == Constraint.json(json.dumps(TICKET, indent=3))
    assert len({Constraint.choice(["a", "b"]), Constraint.choice(("a", "b")), Constraint.regex("a|b")}) == 2
    assert Constraint.json(True).kind == "json"
    assert Constraint.json({"properties": {"b": True, "a": True}}).text.index('"b"') < 20  # order is kept


# -- check -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "text", "message"),
    [
        (Constraint.choice(["yes", "no"]), "Yes", "'Yes' is not one of 'yes', 'no'"),
        (Constraint.choice(["yes", "no"]), "yes\n", r"'yes\n' is not one of 'yes', 'no'"),
        (Constraint.regex(r"é+\d"), "ééx\n", r"the answer leaves its regex at character 3: 'x\n'"),
        (Constraint.regex(r"é+\d"), "é", "the answer ends before its regex does: 'é'"),
        (Constraint.regex(r"é+\d"), "é\ud800", r"the answer leaves its regex at character 2: '\ud800'"),
        (Constraint.grammar(SUM), "1 + (2 * )", "the answer leaves its grammar at character 10: ')'"),
        (Constraint.grammar(SUM), "1 +", "the answer ends before its grammar does: '1 +'"),
        (
            Constraint.json(TICKET),
            '{"team": "billing", "who": {"age": 500}, "tags": ["a"]}',
            "the answer is not in its JSON schema: $.who.age: 500 is greater than the maximum of 120",
        ),
        (
            Constraint.json(TICKET),
            "{'team': 1}",
            "the answer is not JSON that can be checked: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)",
        ),
        (
            Constraint.json({"type": "number"}),
            "NaN",
            "the answer is not JSON that can be checked: NaN is not a number in JSON",
        ),
    ],
)
def test_check_says_in_one_line_what_is_wrong(constraint: Constraint, text: str, message: str) -> None:
    with pytest.raises(PolytaskError) as caught:
        constraint.check(text)
    assert str(caught.value) == message


def test_check_survives_what_json_can_do() -> None:
    for text in ("[" * 100_000, "1" * 10_000, '"a' * 1000):
        assert not fits(Constraint.json({"type": "boolean"}), text)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constraint.choice([]), "a choice needs at least one string to choose"),
        (lambda: Constraint.choice("yes"), "a choice is a list of strings, not 'yes'"),
        (lambda: Constraint.choice([1]), r"a choice is a list of strings, not \[1\]"),  # type: ignore[list-item]
        (lambda: Constraint.choice(["\ud800"]), "choice: .*surrogates not allowed"),
        (lambda: Constraint.regex("ab/(c"), r"regex: unclosed group, at '\(c'"),
        (lambda: Constraint.regex("a(?=b)"), r"regex: look-around, .* is not supported, at '\(\?=b\)'"),
        (lambda: Constraint.regex(r"\bfoo"), r"regex: lookarounds not supported yet"),
        (lambda: Constraint.regex(r"[^\s\S]"), "regex: nothing satisfies it"),
        (lambda: Constraint.regex(r"a[^\s\S]"), "regex: nothing satisfies it"),
        (lambda: Constraint.grammar(""), "grammar: no start rule found"),
        (lambda: Constraint.grammar("start: x\nx: foo"), 'grammar: line 2, column 4: unknown name: "foo"'),
        (lambda: Constraint.grammar('start: "a" start'), "grammar: nothing satisfies it"),
        (lambda: Constraint.grammar('start: <|endoftext|> "a"'), "grammar: line 1, column 8: unknown special token"),
        (lambda: Constraint.json("{"), "json: the schema is not JSON: Expecting property name"),
        (lambda: Constraint.json({"a": {1}}), "json: the schema is not JSON: Object of type set"),
        (lambda: Constraint.json([]), r"json: a schema is an object or a truth value, not \[\]"),  # type: ignore[arg-type]
        (
            lambda: Constraint.json({"properties": {"a": {"type": "strin"}}}),
            r"json: \$\.properties\.a\.type: 'st",
        ),
        (lambda: Constraint.json({"enum": ["\ud800"]}), "json: Value is not JSON serializable"),
        (lambda: Constraint.json(False), "json: Unsatisfiable schema: anyOf is empty"),
        (lambda: Constraint.json({"enum": []}), "json: Unsatisfiable schema"),
        (lambda: Constraint.json({"type": "integer", "minimum": 3, "maximum": 2}), r"minimum \(3\) is greater"),
        (lambda: Constraint.json({"type": "array", "items": {"$ref": "#"}, "minItems": 1}), "nothing satisfies it"),
        (lambda: Constraint.json({"not": {}}), 'Unimplemented keys: ."not".'),
        (lambda: Constraint.json({"$ref": "http://127.0.0.1:9/x"}), "json: Resource .* is not present"),
    ],
)
def test_what_cannot_be_satisfied_or_read_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_a_tokenizer_cannot_spell_is_refused() -> None:
    guides = GUIDES["unigram"]
    with pytest.raises(UsageError, match=r"^choice: this tokenizer has no tokens for 'Ω'$"):
        guides.open(Constraint.choice(["yes", "Ω"]))
    with pytest.raises(UsageError, match=r"^regex: this tokenizer has no token that begins an answer$"):
        guides.open(Constraint.regex("Ω."))
    guide = guides.open(Constraint.regex("yesΩ"))
    for letter in "yes":
        guide.accept(SPELLED["unigram"].index(letter.encode()))
    with pytest.raises(PolytaskError, match=r"^no token may follow 'yes'"):
        guide.allowed()


@pytest.mark.parametrize("token", [1, 406, 10**9])
def test_a_token_that_is_not_allowed_is_refused(token: int) -> None:
    guide = GUIDES["byte-level"].open(Constraint.choice(["yes", "no"]))
    guide.accept(SPELLED["byte-level"].index(b"n"))
    with pytest.raises(PolytaskError, match=f"^token {token} may not follow 'n'$"):
        guide.accept(token)


def test_tokenizers_that_cannot_be_used() -> None:
    made = byte_level()
    with pytest.raises(UsageError, match=r"^constraints cannot use .*: .*vocab size too small"):
        Guides(made, 100)
    made.eos_token = None
    with pytest.raises(UsageError, match=r"^constraints need a tokenizer with an end-of-sequence token$"):
        Guides(made, 500)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a")
    with pytest.raises(UsageError, match=r"^constraints cannot use .*: can't determine decoder type"):
        Guides(words, 1)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"^constraints need the llguidance package: pip install 'polytask\[constrai"):
        Guides(TOKENIZERS["byte-level"], 500)
