"""TADA: an adapter for another way to write, such as a dialect, that every task's adapter can stand on.

    z = pool f(x)                       x [T] the standard text, f the frozen backbone alone
    h = pool f_φ(x̃)                    x̃ the same in the variety, f_φ the backbone with the adapter
    L_align = mean ‖z − h‖²             summed over the d features
    adapter: min L_align − γ c(f_φ(x̃))        critic: min c(f_φ(x̃)) − c(f(x))

Held, Ziems, Yang 2023, arXiv 2305.16651. The critic c is one transformer layer over all token states, then
d → d/2 → 1 by a ReLU, read at the first token; it learns to tell the two apart, and the adapter to be taken for the
backbone on standard text. No labels and no task: `stack(variety, task)` answers the task's question in the variety.

What differs from the paper: states are pooled as the tasks' heads pool them (the mean, or a decoder's last token),
where the paper's heads read the first token. γ = 0, the critic left out, unless it is asked for; the paper has γ = 1.
Nothing bounds the critic there, its padding mask in the released code looks at the padding instead of the text, and
γ = 0 is what we measured. Embeddings stay frozen, which the released code trains. Two optimisers take turns in place
of a reversed gradient. The adapter of the best epoch on held-out pairs is kept.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import polytask
from polytask.adapters import Adapter, Card, HeadCard, Lineage, ScoreCard
from polytask.backbones import Backbone, heads
from polytask.errors import PolytaskError, UsageError
from polytask.methods import Method, build, passes
from polytask.methods.lifting import Active, Plan
from polytask.methods.method import values
from polytask.methods.passes import Unit
from polytask.methods.union import Union
from polytask.recipes.reading import Reading
from polytask.tasks import Example, Task
from polytask.training import Event, Settings

METRIC = "distance closed"  # 1 − Σ‖z − h‖² / Σ‖z − h₀‖², where h₀ is without the adapter
MANY, FEW = 20, 10  # of so many outputs, where each comes so many times, one says that they are labels


@dataclass(frozen=True)
class Tada:
    """adapter: its method, by name. critic: γ."""

    adapter: str = "pfeiffer"
    critic: float = 0.0


class Critic(nn.Module):
    """c of token states [R, T, d], the real ones by mask [R, T]: [R]."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(d, math.gcd(12, d), 4 * d, dropout=0.0, batch_first=True)
        self.score = nn.Sequential(nn.Linear(d, d // 2), nn.ReLU(), nn.Linear(d // 2, 1))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        read: Tensor = self.layer(states.float(), src_key_padding_mask=~mask)[:, 0]
        found: Tensor = self.score(read)[:, 0]
        return found


def tada(
    base: Backbone,
    task: Task,
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    reading: Reading | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Adapter:
    """An adapter without a head, from pairs of texts: a task whose input is in the variety and whose output is the same
    in standard words.

    `hyperparameters` are those of `Tada` and of the adapter's method together. Its scores say which share of the
    squared distance it closes on pairs it has not seen: 1 is all of it.

    Raises UsageError for a method without sites, PolytaskError for a task that is no pairs of texts.
    """
    began = time.perf_counter()
    own, method = split(hyperparameters or {})
    settings, reading = settings or Settings(), reading or Reading()
    if method.swaps or method.opaque or method.slots or isinstance(method, Union):
        raise UsageError(f"tada.adapter = {method.name}: one method that acts at sites is needed, to stand on")
    head = HeadCard(
        kind="classification",
        pool=reading.pool or ("last" if base.kind == "decoder" else "mean"),
        causal=reading.causal,
    )
    if head.pool not in heads.POOLS[:3]:
        raise UsageError(f"tada aligns texts pooled by {', '.join(heads.POOLS[:3])}, not by {head.pool}")
    parts = {name: _pairs(base, head, task, name, settings.tokens) for name in ("train", "validation", "test")}
    if not parts["train"].variety:
        raise PolytaskError(f"task {task.name}: no training pairs")
    first = method.start(base, settings.seed)
    tensors = {name: t.to(base.device) for name, t in first.items()}
    taught = _Taught(base, head, method, tensors, own.critic, settings)
    tell = on_event or (lambda event: None)
    train, held = parts["train"], parts["validation"]
    size = settings.batch
    each = -(-len(train.variety) // size)
    epochs = settings.rounds(each)
    draw = torch.Generator().manual_seed(settings.seed)
    best, chosen, stale, history = 0.0, {n: t.detach().clone() for n, t in tensors.items()}, 0, []
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(train.variety), generator=draw).tolist()
        losses = []
        for step, rows in enumerate((order[i : i + size] for i in range(0, len(order), size)), (epoch - 1) * each):
            losses.append(taught.step(train, rows, step, epochs * each))
            at = (step + 1) / each
            tell(Event("step", 0, step + 1, epochs * each, at, losses[-1], best, time.perf_counter() - began, METRIC))
        loss = sum(losses) / len(losses)
        found = taught.closed(held).value if held.variety else -loss
        history.append({"epoch": epoch, "loss": loss, "score": found, "seconds": time.perf_counter() - began})
        better = found > best or not held.variety
        best, stale = (found, 0) if better else (best, stale + 1)
        if better:
            chosen = {n: t.detach().clone() for n, t in tensors.items()}
        done = stale >= settings.patience or epoch == epochs
        for kind in ("score", "done") if done else ("score",):
            spent = time.perf_counter() - began
            tell(Event(kind, 0, epoch * each, epochs * each, epoch, loss, found, spent, METRIC))
        if done:
            break
    taught.tensors = chosen
    scores = {n: taught.closed(parts[n]) for n in ("validation", "test") if parts[n].variety}
    data = task.card().model_copy(update={"metric": METRIC})
    card = Card(
        name=task.name,
        task=data,
        scores=scores,
        lineage=Lineage(data=data.sha256, made_by=f"polytask {polytask.__version__}"),
        licence=task.licence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        trained_parameters=sum(t.numel() for n, t in chosen.items() if method.trains(n)),
        seconds=round(time.perf_counter() - began, 3),
        recipe={
            "recipe": "tada",
            "tada": dataclasses.asdict(own),
            "settings": vars(settings) | {"lr": settings.rate(method.name, base.hidden_size)},
            "history": history,
        },
        notes=(*task.notes, f"aligned on {len(train.variety)} pairs of texts; it has no head: put it below a task's"),
    )
    kept = {n: t.detach().float().cpu().contiguous() for n, t in chosen.items()}
    return Adapter(method.name, method.hyperparameters(), kept, base.card(), card)


def split(hyperparameters: Mapping[str, Any]) -> tuple[Tada, Method]:
    """Those of `Tada`, and the adapter's method with the rest."""
    names = {field.name for field in dataclasses.fields(Tada)}
    own: Tada = Tada(**values(Tada, "tada", {n: v for n, v in hyperparameters.items() if n in names}))
    if own.critic < 0:
        raise UsageError(f"tada.critic = {own.critic}: 0 or more is needed")
    method = build(own.adapter, {n: v for n, v in hyperparameters.items() if n not in names})
    if method.composed:
        raise UsageError(f"tada.adapter = {own.adapter}: one that stands by itself is needed")
    return own, method


@dataclass(frozen=True)
class _Pairs:
    """Both texts of each pair as units, z [N, d], and ‖z − h₀‖² [N]."""

    variety: list[Unit]
    standard: list[Unit]
    z: Tensor
    before: Tensor


def _pairs(base: Backbone, head: HeadCard, task: Task, split: str, limit: int) -> _Pairs:
    said = []
    for e in task.split(split):
        wanted = e.output[0] if isinstance(e.output, tuple) else e.output
        if not isinstance(wanted, str) or not isinstance(e.input, str):
            raise PolytaskError(
                f"task {task.name}: example {e.id} is no pair of texts; tada needs the variety's as its "
                "input and the standard one as its output"
            )
        said.append((e.input, wanted))
    if len(said) >= MANY and len(known := {wanted for _, wanted in said}) <= len(said) // FEW:
        raise PolytaskError(
            f"task {task.name}: {len(said)} outputs are {len(known)} different ones, such as {min(known)!r}: these are "
            "labels; tada needs texts in standard words, each of its own input"
        )
    variety, standard = (passes.encode(base, head, [Example("", pair[i]) for pair in said], limit) for i in (0, 1))
    if not said:
        return _Pairs([], [], torch.empty(0, base.hidden_size), torch.empty(0))
    z, h = (torch.stack(passes.features(base, head, units)) for units in (standard, variety))
    return _Pairs(variety, standard, z, (z - h).square().sum(-1))


class _Taught:
    """The adapter's tensors, its critic, and their optimisers."""

    def __init__(
        self, base: Backbone, head: HeadCard, method: Method, tensors: dict[str, Tensor], γ: float, settings: Settings
    ) -> None:
        self.base, self.head, self.method, self.tensors, self.γ, self.settings = (
            base,
            head,
            method,
            tensors,
            γ,
            settings,
        )
        self.own = [t.requires_grad_() for n, t in tensors.items() if method.trains(n)]
        self.peak = settings.rate(method.name, base.hidden_size)
        self.optimiser = torch.optim.AdamW(self.own, lr=self.peak, weight_decay=settings.weight_decay)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.critic = Critic(base.hidden_size).to(base.device)
        self.judging = torch.optim.AdamW(self.critic.parameters(), lr=self.peak, weight_decay=0.0)

    def step(self, pairs: _Pairs, rows: Sequence[int], step: int, steps: int) -> float:
        """One batch; L_align."""
        warm = max(1.0, self.settings.warmup * steps)
        share = min((step + 1) / warm, (steps - step) / max(1.0, steps - warm))
        self.optimiser.param_groups[0]["lr"] = self.peak * share
        active = Active.of(self.method, self.tensors)
        batch = self.base.collate([pairs.variety[i].ids[0] for i in rows])
        states = Plan(self.base, [active], training=True).hidden(batch, causal=self.head.causal)
        h = heads.features(self.head, states, batch.mask)
        L_align = (pairs.z[rows].to(h.device) - h).square().sum(-1).mean()
        found = float(L_align.detach())
        if not math.isfinite(found):
            raise PolytaskError(
                f"tada: the loss became {found} at step {step + 1}; try a smaller lr than {self.peak:g}"
            )
        loss = L_align
        terms = [self.method.penalty(dict(p)) for p in active.at.values()]
        for term in (term for term in terms if term is not None):
            loss = loss + term
        if self.γ:
            with torch.no_grad():
                plain = self.base.collate([pairs.standard[i].ids[0] for i in rows])
                standard = self.base.hidden(plain, causal=self.head.causal)
            apart = self.critic(states.detach(), batch.mask).mean() - self.critic(standard, plain.mask).mean()
            self.judging.zero_grad()
            apart.backward()
            self.judging.step()
            loss = loss - self.γ * self.critic(states, batch.mask).mean()
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.own, self.settings.clip)
        self.optimiser.step()
        return found

    def closed(self, pairs: _Pairs) -> ScoreCard:
        """1 − Σ‖z − h‖² / Σ‖z − h₀‖², with its 95 % bootstrap interval."""
        active = Active.of(self.method, {n: t.detach() for n, t in self.tensors.items()})
        h = torch.stack(passes.features(self.base, self.head, pairs.variety, terms=((1.0, active),)))
        a, b = ((pairs.z - h).square().sum(-1), pairs.before.clamp(min=1e-12))
        drawn = torch.from_numpy(np.random.default_rng(0).integers(len(a), size=(1000, len(a))))
        low, high = torch.quantile(1 - a.cpu()[drawn].sum(1) / b.cpu()[drawn].sum(1), torch.tensor([0.025, 0.975]))
        value = float(1 - a.sum() / b.sum())
        return ScoreCard(metric=METRIC, value=value, low=min(value, float(low)), high=max(value, float(high)), n=len(a))
