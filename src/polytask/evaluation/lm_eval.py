"""The referee: EleutherAI's lm-eval scores an engine with any adapter, a mixture, or none.

    python -m polytask.evaluation.lm_eval --model polytask --model_args base=NAME,library=DIR,adapter=NAME --tasks ...

runs lm-eval's own command line with the model `polytask` entered in its registry; `evaluate` does it from Python for
several adapters over one resident backbone, and `compare` tests two of its results item by item. Prompts, few-shot
examples, metrics and standard errors are all lm-eval's; what is here turns its three kinds of requests into passes of
the engine's backbone. The conventions are those of its own `HFLM`, and the numbers are the same: spaces at a context's
end belong to its continuation, an empty context is the token that begins a text, what is too long loses its beginning,
and a rolling likelihood is summed over windows of the backbone's length that predict each token once.

Gao et al., The Language Model Evaluation Harness, doi 10.5281/zenodo.10256836; tested with lm-eval 0.4.13.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytask.adapters.expression import Expression, mix, understood
from polytask.backbones import load, text
from polytask.errors import PolytaskError, UsageError
from polytask.evaluation.significance import Difference, bootstrap, bootstrap_metric, mcnemar
from polytask.inference import Engine
from polytask.inference.engine import WRITER
from polytask.inference.generation import stream
from polytask.inference.writing import Prompt, Sampling
from polytask.library import Library
from polytask.methods import passes
from polytask.methods.lifting import Plan
from polytask.methods.passes import Seat, Unit
from polytask.tasks.resampling import Floats, Resample

try:
    api: Any = importlib.import_module("lm_eval.api.model")
    registry: Any = importlib.import_module("lm_eval.api.registry")
    harness: Any = importlib.import_module("lm_eval.utils")
    models: Any = importlib.import_module("lm_eval.models.utils")  # enters lm-eval's own models, which must come first
    tqdm: Any = importlib.import_module("tqdm").tqdm
except ModuleNotFoundError as missing:
    raise UsageError("the referee needs lm-eval: pip install 'polytask[lm-eval]'") from missing

Who = str | Expression | Mapping[str, float] | None  # an adapter by name or id, several with weights, or none
Requests = Sequence[Any]  # lm-eval's Instance: its `args` are a context and a continuation, or a text, or ...
Scored = tuple[Any, list[int], list[int]]  # what the cache knows it by, the context's tokens, the continuation's

GREEDY = {"top_p", "top_k", "min_p", "temperature"}  # these say nothing where nothing is drawn
log = logging.getLogger("lm_eval.models.polytask")  # lm-eval shows what is said below its own name


@registry.register_model("polytask")
class PolytaskLM(api.TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """An engine's backbone with one adapter, mixture or none, as lm-eval knows models.

    base: the backbone's name (default: that of the adapter). library: the folder that the adapter is in. adapter: its
    name or id, or a mixture, `0.7*a + 0.3*b`. engine: one that is there already, in place of base and library.
    max_length: of a text in tokens, at most the backbone's (the default). max_gen_toks: of an answer whose task does
    not say. prefix_token_id: what an empty context is (default: the token that begins a text, or ends one). seed: of
    answers that are drawn. batch_size and max_batch_size are what lm-eval gives every model; passes are cut by tokens
    here, so they have no effect.

    Raises UsageError where base or adapter cannot be found, or where the backbone has no language-model head.
    """

    def __init__(
        self,
        base: str | None = None,
        library: str | None = None,
        adapter: Who | int | float = None,
        *,
        engine: Engine | None = None,
        precision: Any = "auto",
        device: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        adapter = str(adapter) if isinstance(adapter, int | float) else adapter  # lm-eval reads adapter=7 as a number
        if engine is None:
            engine = _open(base, library, adapter, precision, device)
        elif base is not None or library is not None:
            raise UsageError("give an engine, or base and library, and not both")
        backbone = engine.backbone
        if not backbone.writes:
            raise UsageError(f"{backbone.name} has no language-model head, so lm-eval cannot score it; name a decoder")
        if max_length is not None and not 1 <= max_length <= backbone.max_length:
            raise UsageError(f"max_length = {max_length}: {backbone.name} has {backbone.max_length} positions")
        self.engine = engine
        self.tokenizer = backbone.tokenizer
        self.backend = "seq2seq" if backbone.kind == "encoder-decoder" else "causal"
        ref = None if adapter is None else _parsed(engine.find, adapter)
        self.adapter = None if ref is None else str(ref)
        self.adapters = {} if ref is None else {name: engine.find(name) for name in ref.names()}
        self.max_length: int = max_length or backbone.max_length
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self._prefix, self._device = prefix_token_id, backbone.device
        terms = () if ref is None else engine.reader(ref).terms
        self._plan = Plan(backbone, [active for _, active in terms])
        self._row = torch.tensor([weight for weight, _ in terms])
        self._lead = self.tokenizer.decode([self.prefix_token_id])
        # A decoder goes on from its context, so an end token that its tokenizer puts behind every text goes.
        whole, bare = (self.tokenizer("a", add_special_tokens=own)["input_ids"] for own in (True, False))
        self._after = len(whole) - whole.index(bare[0]) - len(bare) if bare and self.backend == "causal" else 0

    # -- what lm-eval asks of every model ------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text without a context."""
        if self._prefix is not None:
            return self._prefix
        begin = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if begin is None else begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as one text, with the beginning of an answer, or without where the last turn begins it."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(f"{self.engine.backbone.name} has no chat template; leave out --apply_chat_template")
        said: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return said

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results, so that nobody has to ask whether the adapter was there."""
        backbone = self.engine.backbone
        return {
            "backbone": backbone.name,
            "fingerprint": backbone.fingerprint,
            "precision": backbone.precision,
            "adapter": self.adapter,
            "adapters": self.adapters,
            "model_num_parameters": backbone.parameters,
        }

    # -- likelihoods ---------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text's tokens; one that shows its own beginning, as chat templates write it, gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = not (self._lead and string.startswith(self._lead))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids[: len(ids) - self._after] if add_special_tokens else ids

    def loglikelihood_rolling(self, requests: Requests, disable_tqdm: bool = False) -> list[float]:
        """log p of each text, in nats: Σ over windows of `max_length` tokens."""
        windows: list[Scored] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in harness.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *harness.make_disjoint_window(pair)))
                owners.append(i)
        found = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            found[i] += logprob
        for request, logprob in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation in nats, and whether it is what greedy decoding writes.

        Continuations that differ in their last token alone are read off one row of one pass.
        """
        rows: dict[Any, Unit] = {}
        owners: dict[Any, list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            unit = self._unit(context, continuation)
            key = (tuple(unit.ids[0]), tuple(unit.written or ()))
            owners.setdefault(key, []).append(i)
            if key not in rows or len(rows[key].at) < len(unit.at):
                rows[key] = unit
        asked, units = list(owners.values()), list(rows.values())
        seat, which = Seat(WRITER, {}, self._row), [0] * len(units)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        with self.engine._lock, torch.no_grad(), bar:
            packable = self.engine.backbone.packable
            for pack in passes.schedule([seat], units, which, packable=packable):
                for _seat, members, z in passes.forward(self._plan, [seat], [units[i] for i in pack], [0] * len(pack)):
                    parts = torch.split(z.log_softmax(-1), [len(units[pack[j]].at) for j in members])
                    for j, log_p in zip(members, parts, strict=True):
                        for i in asked[pack[j]]:
                            found[i] = _read(log_p, requests[i][2])
                            if requests[i][0] is not None:
                                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                            bar.update()
        return found

    def _unit(self, context: list[int], continuation: list[int]) -> Unit:
        if not continuation:
            raise PolytaskError("a continuation has no tokens of its own; see its doc_to_target and target_delimiter")
        if len(continuation) > self.max_length:
            raise PolytaskError(
                f"a continuation has {len(continuation)} tokens, and {self.engine.backbone.name} has {self.max_length}"
            )
        # A decoder predicts the last token and does not read it.
        room = self.max_length + 1 - len(continuation) if self.backend == "causal" else self.max_length
        return passes.answered(self.engine.backbone, [text.Asked(self._cut(context, room), continuation)])[0]

    def _cut(self, context: list[int], room: int) -> list[int]:
        if len(context) > room:
            harness.warning_once(
                log, f"contexts lose their beginning where they and what follows exceed {self.max_length} tokens"
            )
        return context[-room:]

    # -- answers -------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Requests, disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to one of its `until`."""
        prompts: list[Prompt] = []
        stops: list[list[str]] = []
        for i, request in enumerate(requests):
            context, given = request.args
            rule, until = self._rule(given, self.seed + i)
            room = self.max_length - (rule.max_tokens if self.backend == "causal" else 0)
            if room < 1:
                raise UsageError(
                    f"max_gen_toks = {rule.max_tokens} leaves no room for a prompt: {self.engine.backbone.name} has "
                    f"{self.max_length} positions; set it lower in the task or with --gen_kwargs"
                )
            ids = self._cut(self.tok_encode(context) or [self.prefix_token_id], room)
            prompts.append(Prompt(ids, self._row, rule))
            stops.append(until)
        tokens: list[list[int]] = [[] for _ in requests]
        found = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        with self.engine._lock, torch.no_grad(), bar:
            for piece in stream(self._plan, prompts):
                i = piece.row
                if piece.ended != "end":
                    tokens[i].append(piece.token)
                if piece.ended:
                    found[i] = self._said(tokens[i], stops[i])
                    self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
                    bar.update()
        return found

    def _rule(self, given: Mapping[str, Any], seed: int) -> tuple[Sampling, list[str]]:
        """The rule for the next token that lm-eval's generation_kwargs mean, and the texts before which to stop.

        Raises UsageError for one that is not known here.
        """
        rest = dict(models.normalize_gen_kwargs(dict(given), self.max_gen_toks))
        end = self.tokenizer.decode([self.eot_token_id])
        until = [stop for stop in models.handle_stop_sequences(rest.pop("until"), end) if stop]
        max_tokens, drawn = rest.pop("max_gen_toks"), rest.pop("do_sample")
        if not drawn:
            rest = {name: value for name, value in rest.items() if name not in GREEDY}
        temperature, top_p = rest.pop("temperature", 1.0) if drawn else 0.0, rest.pop("top_p", 1.0)
        odd = sorted(name for name, value in rest.items() if not (name == "num_beams" and value == 1))
        if odd:
            raise UsageError(
                f"generation_kwargs has {', '.join(odd)}, which the engine does not do; it takes until, max_gen_toks, "
                "do_sample, temperature and top_p"
            )
        return Sampling(max_tokens, float(temperature), float(top_p), seed, tuple(until)), until

    def _said(self, tokens: list[int], until: list[str]) -> str:
        """The text of an answer, cut where `until` says; a special token stops it too, although it has no text."""
        special = {self.tokenizer.convert_tokens_to_ids(s) for s in until if s in self.tokenizer.all_special_tokens}
        at = next((at for at, token in enumerate(tokens) if token in special), len(tokens))
        said = self.tokenizer.decode(tokens[:at], skip_special_tokens=True)
        return str(models.postprocess_generated_text(said, until, None))


def evaluate(
    engine: Engine,
    tasks: str | Sequence[Any],
    adapters: Sequence[Who] = (None,),
    *,
    include_path: Any = None,
    task_manager: Any = None,
    model: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """lm-eval's results of each adapter, by its name (a mixture's formula; "none" for the backbone alone).

    The backbone stays where it is; adapters come from the engine's source. `tasks` are lm-eval's: names, or settings as
    dictionaries. `include_path` is a folder of tasks as YAML; lm-eval's own, which take long to list, are then left
    out, unless a `task_manager` is given. `model` has arguments of `PolytaskLM` (max_length, max_gen_toks, seed);
    `options` are those of `lm_eval.simple_evaluate`: num_fewshot, limit, apply_chat_template, gen_kwargs, ...
    """
    from lm_eval import simple_evaluate  # type: ignore[import-untyped,import-not-found,unused-ignore]
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped,import-not-found,unused-ignore]

    if options.get("use_cache") and len(adapters) > 1:
        raise UsageError("use_cache knows a request and not whose it is; score one adapter at a time with it")
    scored = [PolytaskLM(engine=engine, adapter=adapter, **(model or {})) for adapter in adapters]
    manager = task_manager or TaskManager(include_path=include_path, include_defaults=include_path is None)
    wanted = [tasks] if isinstance(tasks, str) else list(tasks)
    return {
        lm.adapter or "none": simple_evaluate(model=lm, tasks=wanted, task_manager=manager, **options) for lm in scored
    }


def compare(
    first: Mapping[str, Any], second: Mapping[str, Any], *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Difference]]:
    """The difference of two results of `evaluate` in each task and metric, from the same items.

    McNemar's test where every item is right or wrong, else the paired bootstrap; a metric of all items together
    (perplexity, F1, BLEU) is computed anew from each draw by lm-eval's own function. A metric whose function cannot be
    found by name (one that is code in a task's folder) is left out, and lm-eval's log says so.

    Raises UsageError where the two have other tasks or no samples, PolytaskError where their items are not the same.
    """
    both = (first, second)
    if not all(one.get("samples") for one in both):
        raise UsageError("no samples to compare; evaluate with log_samples=True")
    if first["samples"].keys() != second["samples"].keys():
        other = ", ".join(sorted(first["samples"].keys() ^ second["samples"].keys()))
        raise UsageError(f"the two were not scored on the same tasks: {other}")
    found: dict[str, dict[str, Difference]] = {}
    for task in first["samples"]:
        found[task] = {}
        by_filter = [_items(one["samples"][task]) for one in both]
        for filter, mine in by_filter[0].items():
            its = by_filter[1].get(filter, [])
            if [item["doc_hash"] for item in mine] != [item["doc_hash"] for item in its]:
                raise PolytaskError(f"{task}: the two were not scored on the same items")
            for name in mine[0]["metrics"]:
                reported = [float(one["results"][task][f"{name},{filter}"]) for one in both]
                values = [[item.get(name) for item in items] for items in (mine, its)]
                together = _aggregation(name, first["configs"][task])
                whole = together is not None and not any(x is None for side in values for x in side)
                if not whole or not np.allclose([together(side) for side in values], reported, equal_nan=True):
                    log.warning(f"{task}: {name} is left out; what makes it of its items is not known by name")
                    continue
                found[task][f"{name},{filter}"] = _difference(name, together, values, resamples, seed)
    return found


def _items(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The samples of each of a task's filters, in the order of its documents."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        found.setdefault(sample["filter"], []).append(sample)
    return found


def _aggregation(name: str, config: Mapping[str, Any]) -> Any:
    """The function that makes a metric of its items' values, or None where a task has one of its own."""
    listed = {metric["metric"]: metric for metric in config.get("metric_list") or ()}
    said = listed.get(name, {}).get("aggregation")
    try:
        return registry.get_aggregation(said) if said else registry.get_metric_aggregation(name)
    except (KeyError, ValueError):
        return None


def _difference(name: str, together: Any, values: Sequence[Sequence[Any]], resamples: int, seed: int) -> Difference:
    a, b = values
    if together is not registry.get_aggregation("mean"):
        drawn = _resample(together, a), _resample(together, b)
        return bootstrap_metric(*drawn, len(a), metric=name, resamples=resamples, seed=seed)
    if {*a, *b} <= {0, 1}:
        return mcnemar(a, b, metric=name)
    return bootstrap(a, b, metric=name, resamples=resamples, seed=seed)


def _resample(together: Any, items: Sequence[Any]) -> Resample:
    def resample(w: Floats) -> Floats:
        counts = w.astype(np.int64).tolist()
        return np.array([together([x for x, n in zip(items, row, strict=True) for _ in range(n)]) for row in counts])

    return resample


def _read(log_p: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """(log p, is greedy) of a continuation whose tokens the last rows of `log_p` [positions, V] predict."""
    last = log_p[-len(continuation) :]
    tokens = torch.tensor(continuation, device=last.device)
    return float(last.gather(1, tokens[:, None]).sum()), bool((last.argmax(-1) == tokens).all())


def _open(base: str | None, library: str | None, adapter: Who, precision: Any, device: str) -> Engine:
    """An engine over the backbone that is named, or that the adapter names."""
    kept = Library(library, create=False) if library is not None else None
    if base is None:
        if kept is None or adapter is None:
            raise UsageError("say which backbone: --model_args base=NAME, or library=DIR,adapter=NAME")
        some = _parsed(kept.entry, adapter)
        base = kept.entry(next(some.names())).backbone
    if device.startswith("cuda") and not torch.cuda.is_available():
        device = "auto"  # lm-eval's command asks for cuda:0 where its user asks for nothing
    return Engine(load(base, precision=precision, device=device), source=kept)


def _parsed(known: Any, adapter: str | Expression | Mapping[str, float]) -> Expression:
    """What was asked for; `known` raises UsageError where a name is not."""
    if isinstance(adapter, Mapping):
        return mix(adapter)
    return understood(adapter, known) if isinstance(adapter, str) else adapter


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped,import-not-found,unused-ignore]

    try:
        cli_evaluate()
    except PolytaskError as error:
        print(f"polytask: {error}", file=sys.stderr)
        sys.exit(error.status)
