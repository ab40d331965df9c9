"""Constraints: an answer is one of some strings, or matches a regex, a JSON schema or a grammar.

    m_t(y) = 1 if y·b(t) begins a string of L, else 0        logits[t] ← logits[t] if m_t(y) else -∞

Willard, Louf 2023, arXiv 2307.09702 read such masks m [vocabulary] from an automaton over L, the language of the
constraint; y are the bytes so far and b(t) those of token t. The engine is llguidance, which walks a tree of all
tokens' bytes with a lexer (derivatives of regexes) and an Earley parser: grammars that nest are masked the same way,
and nothing is indexed beforehand. Bytes and not characters: a token may end inside of é or 日.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from polytask.errors import PolytaskError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# JSON on one line, with or without the spaces of `json.dumps`: a model that may write any white space can write nothing
# else for ever. A schema's own "x-guidance" comes before this.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


@dataclass(frozen=True)
class Constraint:
    """What an answer may be. `options` are a choice's strings; `text` is the regex, the JSON schema or the grammar.

    A value that exists can be satisfied: one that cannot, or that llguidance cannot read, is a UsageError. What is seen
    is a contradiction where the answer begins; a grammar whose every branch calls itself again passes, and its answers
    never end.
    """

    kind: Literal["choice", "regex", "json", "grammar"]
    text: str = ""
    options: tuple[str, ...] = ()

    @classmethod
    def choice(cls, options: Sequence[str]) -> Constraint:
        """Exactly one of these strings."""
        if isinstance(options, str) or not all(isinstance(option, str) for option in options):
            raise UsageError(f"a choice is a list of strings, not {_short(repr(options))}")
        return cls("choice", options=tuple(options))

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        r"""The whole answer matches. The syntax is Rust's: no look-around; `\d` has all of Unicode's digits."""
        return cls("regex", pattern)

    @classmethod
    def json(cls, schema: Mapping[str, Any] | bool | str) -> Constraint:
        """JSON (draft 2020-12) on one line, with an object's properties in the schema's order. A str is JSON itself."""
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            value = {True: {}, False: {"enum": []}}[value] if isinstance(value, bool) else value
            text = json.dumps(value, ensure_ascii=False)  # not sorted: the order of properties says something
        except (TypeError, ValueError) as error:
            raise UsageError(f"json: the schema is not JSON: {error}") from None
        if not text.startswith("{"):
            raise UsageError(f"json: a schema is an object or a truth value, not {_short(text)}")
        return cls("json", text)

    @classmethod
    def grammar(cls, lark: str) -> Constraint:
        """What the rule `start` derives, in llguidance's kind of Lark; without special tokens, as answers are text."""
        return cls("grammar", lark)

    def __post_init__(self) -> None:
        if self.kind == "choice" and not self.options:
            raise UsageError("a choice needs at least one string to choose")
        if self.kind == "json":
            validator = self._validator()
            try:
                validator.check_schema(validator.schema)
            except _need("jsonschema").SchemaError as error:
                raise UsageError(f"json: {error.json_path}: {_short(error.message)}") from None
        probe = _matcher(_bytes(), self)
        probe.consume_tokens(list(probe.compute_ff_bytes()))
        probe.compute_logit_bias()
        if probe.is_error():
            raise UsageError(f"{self.kind}: nothing satisfies it")

    def check(self, text: str) -> None:
        """PolytaskError, in one line, where `text` is not such an answer.

        JSON is checked as a value, by `jsonschema`: spaces and the order of properties are free here.
        """
        if self.kind == "choice":
            if text not in self.options:
                raise PolytaskError(f"{_short(repr(text))} is not one of {_short(', '.join(map(repr, self.options)))}")
        elif self.kind == "json":
            try:
                value = json.loads(text, parse_constant=_no_constant)
                error = _need("jsonschema").exceptions.best_match(self._validator().iter_errors(value))
            except (ValueError, RecursionError) as problem:
                raise PolytaskError(f"the answer is not JSON that can be checked: {_short(str(problem))}") from None
            if error is not None:
                raise PolytaskError(f"the answer is not in its JSON schema: {error.json_path}: {_short(error.message)}")
        else:
            matcher, data = _matcher(_bytes(), self), text.encode(errors="surrogatepass")
            taken = matcher.try_consume_tokens(list(data))
            place = len(data[:taken].decode(errors="ignore"))
            if taken < len(data):
                rest = _short(repr(text[place:]))
                raise PolytaskError(f"the answer leaves its {self.kind} at character {place + 1}: {rest}")
            if not matcher.is_accepting():
                raise PolytaskError(f"the answer ends before its {self.kind} does: {_short(repr(text))}")

    def _validator(self) -> Any:
        schema, jsonschema = json.loads(self.text), _need("jsonschema")
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        # its own registry, because jsonschema's default one would fetch what a `$ref` names
        return kind(schema, registry=_need("jsonschema_specifications").REGISTRY)


class Guides:
    """What one tokenizer needs for constraints; grammars are compiled once and kept.

    `tokenizer` is a fast one of Hugging Face whose tokens have bytes: byte-level BPE, or SentencePiece's "▁" with or
    without byte tokens. `vocabulary` is the width of the logits; what it has beyond the tokenizer is never allowed.
    Special tokens other than the end of sequence are not either. UsageError for another kind of tokenizer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        llguidance = _need("llguidance")
        self.end = tokenizer.eos_token_id
        if self.end is None:
            raise UsageError("constraints need a tokenizer with an end-of-sequence token")
        try:
            self._tokenizer: LLTokenizer = llguidance.LLTokenizer(_literal(tokenizer), vocabulary, self.end)
        except (AttributeError, ValueError) as error:
            raise UsageError(f"constraints cannot use {type(tokenizer).__name__}: {_short(str(error))}") from None
        words = (token for token in range(vocabulary) if not self._tokenizer.is_special_token(token))
        self._pieces = frozenset(self._tokenizer.decode_bytes([token]) for token in words)
        self._compiled = functools.lru_cache(maxsize=256)(self._compile)

    def open(self, constraint: Constraint, lead: str = "") -> Guide:
        """A new answer. `lead` is literal text before it, such as the space that belongs to the answer's first token.

        UsageError where this tokenizer has no tokens for a choice, or none to begin with.
        """
        return Guide(self._compiled(constraint, lead).deep_copy(), self._tokenizer)

    def _compile(self, constraint: Constraint, lead: str) -> LLMatcher:
        for option in constraint.options:
            if not self._spells((lead + option).encode()):
                raise UsageError(f"choice: this tokenizer has no tokens for {_short(repr(option))}")
        matcher = _matcher(self._tokenizer, constraint, lead)
        try:
            Guide(matcher, self._tokenizer).allowed()
        except PolytaskError:
            raise UsageError(f"{constraint.kind}: this tokenizer has no token that begins an answer") from None
        return matcher

    def _spells(self, data: bytes) -> bool:
        """Whether some tokens' bytes, one after the other, are `data`."""
        ends = [True] + [False] * len(data)
        for end in range(1, len(ends)):
            ends[end] = any(ends[start] and data[start:end] in self._pieces for start in reversed(range(end)))
        return ends[-1]


class Guide:
    """One answer on its way: `allowed`, choose, `accept`, until `done` or the end-of-sequence token was chosen."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer
        self._tokens: list[int] = []

    @property
    def done(self) -> bool:
        """Nothing more may follow: the end of sequence was accepted, or is all that is left."""
        matcher = self._matcher
        return matcher.is_stopped() or (matcher.is_accepting() and int(self.allowed().count_nonzero()) == 1)

    def allowed(self) -> Tensor:
        """bool [vocabulary], on the CPU: the tokens that may come next; the end of sequence where the answer may end.

        PolytaskError where there is none: no token has the bytes that must follow, or the grammar grew too large.
        """
        bias = self._matcher.compute_logit_bias()  # a byte for each token, 0 or 200
        # An answer that cannot go on is allowed to end by llguidance, and marked as an error.
        if self._matcher.is_error():
            raise PolytaskError(f"no token may follow {self._tail()}: {_reason(self._matcher.get_error())}")
        return torch.frombuffer(bytearray(bias), dtype=torch.uint8).bool()

    def accept(self, token: int) -> None:
        """The token that was chosen. PolytaskError if it is not allowed; the guide is of no more use then."""
        if not self._matcher.consume_token(token):
            raise PolytaskError(f"token {token} may not follow {self._tail()}")
        self._tokens.append(token)

    def branch(self) -> Guide:
        """Another guide that has come as far."""
        other = Guide(self._matcher.deep_copy(), self._tokenizer)
        other._tokens = list(self._tokens)
        return other

    def forced(self) -> list[int]:
        """Tokens that spell the only text on from here, as the tokenizer would; [] where there is a choice of text.

        Tokens that spell it otherwise may be allowed as well. `accept` these in turn, or the first of them.
        """
        probe = self._matcher.deep_copy()
        probe.compute_ff_bytes()  # which narrows later masks to the tokens that follow, hence the copy
        tokens = probe.compute_ff_tokens()
        # a tokenizer that normalizes text may give other bytes than those that are forced
        return tokens[: self._matcher.validate_tokens(tokens)]

    def _tail(self) -> str:
        return repr(self._tokenizer.decode_str(self._tokens[-20:]))


def _matcher(tokenizer: LLTokenizer, constraint: Constraint, lead: str = "") -> LLMatcher:
    """The compiled constraint at its start."""
    llguidance = _need("llguidance")
    slashed = functools.partial(llguidance.regex_to_lark, use_ascii="")
    try:
        start = f"/{slashed(re.escape(lead))}/ @answer" if lead else "@answer"
        if constraint.kind == "json":
            made = llguidance.LLMatcher.grammar_from_json_schema(constraint.text, COMPACT)
            part = json.loads(made)["grammars"][0]
        elif constraint.kind == "grammar":
            part = {"lark_grammar": constraint.text}
        else:  # a choice as one regex is one automaton: thousands of options cost no more than a few
            pattern = constraint.text if constraint.kind == "regex" else "|".join(map(re.escape, constraint.options))
            part = {"lark_grammar": f"start: /{slashed(pattern)}/"}
    except ValueError as error:
        raise UsageError(f"{constraint.kind}: {_short(str(error))}") from None
    # Without `no_forcing`, where only one text can follow, llguidance allows the tokenizer's way of writing it alone.
    whole = {"lark_grammar": f'%llguidance {{"no_forcing": true}}\nstart: {start}'}
    grammars = json.dumps({"grammars": [whole, {**part, "name": "answer"}]})
    matcher: LLMatcher = llguidance.LLMatcher(tokenizer, grammars, log_level=0)
    if matcher.is_error():
        raise UsageError(f"{constraint.kind}: {_reason(matcher.get_error())}")
    return matcher


@functools.cache
def _bytes() -> LLTokenizer:
    """A tokenizer whose tokens are the 256 bytes, to see what a constraint says about text; 256 is the end."""

    class Bytes:
        tokens = (*(bytes([value]) for value in range(256)), b"<end>")
        eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
        __call__ = list

    llguidance = _need("llguidance")
    made: LLTokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    return made


def _literal(tokenizer: Any) -> str:
    """The tokenizer's JSON, without what puts a space before a text, drops one, or changes characters.

    llguidance takes bytes from the decoder, and knows byte-level ones and SentencePiece's with byte tokens. Unigram
    models as T5's decode by Metaspace, which is the same "▁" for a space, with no byte tokens.
    """
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    made |= {"truncation": None, "padding": None}
    splitter = made["pre_tokenizer"] or {}
    for part in splitter.get("pretokenizers", [splitter]):
        if part.get("type") == "Metaspace":
            space = {"type": "Replace", "pattern": {"String": part["replacement"]}, "content": " "}
            decoder = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}
            made |= {"normalizer": None, "pre_tokenizer": {**part, "prepend_scheme": "never"}, "decoder": decoder}
    return json.dumps(made)


def _reason(message: str) -> str:
    """llguidance's message as one line: what is wrong, and where in the regex or on which line of the grammar."""
    lines = message.splitlines() or ["it was refused"]
    # The regex parser prints the pattern, carets under the place, and the error.
    for pattern, carets, error in zip(lines, lines[1:], lines[2:], strict=False):
        if error.startswith("error: ") and "^" in carets:
            return _short(f"{error.removeprefix('error: ')}, at {pattern[carets.index('^') :]!r}")
    first = lines[0].rpartition("(in regex): ")[-1]
    return _short(re.sub(r"^(?:at )?(\d+)\((\d+)\): ", r"line \1, column \2: ", first))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _short(text: str) -> str:
    line = " ".join(text.splitlines())
    return line if len(line) <= 160 else f"{line[:160]} …"


def _need(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"constraints need the {name} package: pip install 'polytask[constraints]'") from None
