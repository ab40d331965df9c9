"""DLP-LoRA: a small classifier, trained on the tasks' inputs, says which adapters answer with which weights.

    z = W₄ σ(W₃ σ(W₂ σ(W₁ x)))       p = softmax(z)          a layer adds its bias; σ = ReLU; x = √d e(x) / ‖e(x)‖
    S = the fewest most probable tasks with Σ_S p ≥ P         Δ = Σ_{t ∈ S} w_t Δ_t,   w_t = p_t / Σ_S p
    nobody  if  (c_t − m_t) / s_t < −threshold for the most probable t, by the task's own e: see `nearest_task`

Zhang, Li 2024, arXiv 2410.01497: four layers, once for each input, P = 0.6 as in the authors' code. The paper's
classifier reads tokens and has 5 million parameters. This one reads e(x) [d], the mean of the frozen backbone's states
half of the way up, and has d h + 2 h² + h N + 3 h + N with h = 256: 0.3 million for N = 26. Half of a pass tells tasks
better than a whole one: of test inputs of eight tasks MiniLM's third block gives 95 % to their own, the last 89 %. It
is trained on short pieces of the inputs too, without which an input of five words goes to its own task in 55 % of cases
instead of 79 %, and of two thirds it is said that they are of no task. The weights are the softmax of the chosen z,
which is p among the chosen; the authors' code takes the softmax of p itself, which is nearly flat. At most `most`
adapters answer together, which the paper does not bound.

A classifier knows the adapters that it was trained for and no others: where they have changed it refuses, and is
trained again in seconds (`polytask library route`). It needs the tasks' data, since what adapters keep of their tasks,
a mean, has no spread in any direction. One in ten inputs is kept apart to tell how often it is right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from polytask.adapters.disk import write_whole
from polytask.backbones import Backbone
from polytask.composition.routing.nearest_task import Profile
from polytask.composition.routing.router import Known, Mixing, Reads, Routed, decided, nobody, router
from polytask.errors import PolytaskError, UsageError
from polytask.methods import passes

KIND = "router"
NAME = "dlp-lora"
PLACE = "input"
EQUATION = "Δ = Σ_{t ∈ S} p_t Δ_t / Σ_S p, p = softmax(MLP(e(x))), S the fewest with Σ_S p ≥ P"
PAPER = "Zhang & Li 2024, arXiv 2410.01497"

LAYERS = 4
HIDDEN = 256
EPOCHS, BATCH, RATE = 30, 64, 1e-3
PIECE = (3, 12)  # words of a piece of an input, at least and at most
VERSION = "2"
AGAIN = "train it with the tasks' data: polytask library route TASK..."


@dataclass(frozen=True, eq=False)
class Classifier:
    """A trained classifier and the adapters that it is for, in the order of their ids. `tensors`: W1 [h, d], b1, ...,
    W4 [N, h], b4. `μ` [N, d] of unit length, `m` and `s` [N]: each task's `Profile`. `right`: the share of inputs that
    were kept apart which it gave to their own adapter. Embeddings are of what block number `block` reads (None: last
    states)."""

    ids: tuple[str, ...]
    names: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)
    μ: Tensor = field(repr=False)
    m: Tensor = field(repr=False)
    s: Tensor = field(repr=False)
    right: float
    block: int | None = None

    @classmethod
    def train(
        cls,
        known: Sequence[tuple[str, str]],
        embeddings: Sequence[Tensor],
        pieces: Sequence[Tensor] = (),
        *,
        block: int | None = None,
        seed: int = 0,
    ) -> Classifier:
        """For adapters (id, name) from the embeddings [n, d] of their tasks' inputs, and of a piece of each if given.
        Raises UsageError where there are fewer than two of them, or one has fewer than two inputs."""
        order = sorted(range(len(known)), key=lambda n: known[n])
        if len(order) < 2:
            raise UsageError(f"{NAME} chooses among adapters: two of one backbone at least are needed")
        if few := [name for (_, name), e in zip(known, embeddings, strict=True) if len(e) < 2]:
            raise UsageError(f"{NAME}: {few[0]} has fewer than two inputs to learn from")
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randperm(len(embeddings[n]), generator=generator) for n in order]
        parts = [embeddings[n][rows] for n, rows in zip(order, drawn, strict=True)]
        apart = [max(1, len(part) // 10) for part in parts]
        learnt = [part[k:] for part, k in zip(parts, apart, strict=True)]
        if pieces:
            each = zip(learnt, order, drawn, apart, strict=True)
            learnt = [torch.cat([part, pieces[n][rows[k:]]]) for part, n, rows, k in each]
        profiles = [Profile.of(part) for part in learnt]
        X, t = _labelled(learnt)
        widths = [X.shape[1], *[HIDDEN] * (LAYERS - 1), len(order)]
        tensors: dict[str, Tensor] = {}
        for n, (reads, width) in enumerate(pairwise(widths), 1):
            W = torch.empty(width, reads)
            torch.nn.init.kaiming_uniform_(W, nonlinearity="relu", generator=generator)
            tensors |= {f"W{n}": W, f"b{n}": torch.zeros(width)}
        for tensor in tensors.values():
            tensor.requires_grad_()
        counts = torch.bincount(t).float()
        with torch.enable_grad():
            optimizer = torch.optim.AdamW(tensors.values(), lr=RATE)
            for _ in range(EPOCHS):
                for rows in torch.split(torch.randperm(len(X), generator=generator), BATCH):
                    loss = F.cross_entropy(_mlp(tensors, X[rows]), t[rows], counts.mean() / counts)
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
        held, own = _labelled([part[:k] for part, k in zip(parts, apart, strict=True)])
        kept = {name: tensor.detach() for name, tensor in tensors.items()}
        right = float((_mlp(kept, held).argmax(-1) == own).float().mean())
        ids, names = zip(*(known[n] for n in order), strict=True)
        μ, m, s = torch.stack([p.mean for p in profiles]), [p.typical for p in profiles], [p.spread for p in profiles]
        return cls(ids, names, kept, μ, torch.tensor(m), torch.tensor(s), right, block)

    def logits(self, embeddings: Tensor) -> Tensor:
        """z [R, N] of embeddings [R, d]."""
        return _mlp(self.tensors, embeddings)

    def save(self, path: Path) -> None:
        """Write one file, whole or not at all. Raises PolytaskError where the disk refuses."""
        said = {"router": NAME, "version": VERSION, "ids": json.dumps(self.ids), "names": json.dumps(self.names)}
        said |= {"right": repr(self.right), "block": json.dumps(self.block)}
        tensors = {**self.tensors, "mu": self.μ, "m": self.m, "s": self.s}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, save({n: t.contiguous() for n, t in tensors.items()}, said))
        except OSError as error:
            raise PolytaskError(f"{path}: not written: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """Raises UsageError where there is none, or an older version's, PolytaskError where the file is damaged."""
        if not path.is_file():
            raise UsageError(f"{path}: {NAME} is not trained yet; {AGAIN}")
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if said["version"] == "1":
                raise UsageError(f"{path}: was trained by an earlier polytask, on other embeddings; {AGAIN}")
            ids, names = (tuple(map(str, json.loads(said[what]))) for what in ("ids", "names"))
            μ, m, s = (tensors.pop(name) for name in ("mu", "m", "s"))
            found = cls(ids, names, tensors, μ, m, s, float(said["right"]), json.loads(said["block"]))
            z, N, d = found.logits(torch.zeros(1, tensors["W1"].shape[1])), len(ids), tensors["W1"].shape[1]
            whole = z.shape == (1, N) == (1, len(names)) and (μ.shape, m.shape, s.shape) == ((N, d), (N,), (N,))
            whole = whole and all(bool(t.isfinite().all()) for t in (z, μ, m, s))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
            whole = False
        if not whole:
            raise PolytaskError(f"{path}: is damaged, or no classifier of {NAME}; {AGAIN}")
        return found


@router(NAME)
class DLP(Mixing):
    """p: P. most: adapters that answer together, at most. threshold: deviations of the most probable task below which
    an input is foreign. classifier: a trained one."""

    p: float = 0.6
    most: int = 8
    threshold: float = 2.0
    classifier: Classifier | None = None

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UsageError(f"{NAME}.p = {self.p:g}: a probability above 0 and up to 1 is needed")

    @property
    def reads(self) -> Reads:
        return "last" if self.classifier is None or self.classifier.block is None else self.classifier.block

    def choose(self, known: Known, embeddings: Tensor, fits: Tensor) -> list[Routed]:
        if not known.ids:
            return nobody(len(embeddings))
        found = self._trained(known)
        p = found.logits(embeddings).masked_fill(~fits, -torch.inf).softmax(-1).nan_to_num(0.0)
        best = p.argmax(-1)
        joined = p * known.mixes(best)
        share = joined / joined.sum(-1, keepdim=True)
        top, which = share.topk(min(self.most, len(known.ids)))
        taken = top * (top.cumsum(-1) - top < self.p)
        sure = (p.gather(1, which) * (taken > 0)).sum(-1).clamp(max=1.0)
        own = replace(known, μ=found.μ, m=found.m, s=found.s)
        near = own.near(own.cosines(embeddings, fits), best, self.threshold)
        return decided(known, which, taken / taken.sum(-1, keepdim=True), sure, near)

    def _trained(self, known: Known) -> Classifier:
        """The classifier, if it is for these adapters."""
        if self.classifier is None:
            raise UsageError(f"{NAME} is not trained yet; {AGAIN}")
        if self.classifier.ids != known.ids:
            new = set(known.names) - set(self.classifier.names)
            gone = set(self.classifier.names) - set(known.names)
            what = [f"new: {', '.join(sorted(new))}"] * bool(new) + [f"gone: {', '.join(sorted(gone))}"] * bool(gone)
            raise UsageError(
                f"{NAME} was trained for other adapters than there are now ({'; '.join(what) or 'other versions'}); "
                f"{AGAIN}"
            )
        return self.classifier


def learned(
    backbone: Backbone, known: Sequence[tuple[str, str]], texts: Sequence[Sequence[str]], limit: int = 256
) -> Classifier:
    """A classifier for adapters (id, name) from the inputs of their tasks. Raises UsageError as `Classifier.train`."""
    half = max(1, len(backbone.blocks) // 2)

    def embed(said: Sequence[str]) -> Tensor:
        return passes.embed(backbone, said, limit, half)

    several = [*map(pieces, texts)]
    return Classifier.train(known, [*map(embed, texts)], [*map(embed, several)], block=half)


def pieces(texts: Sequence[str], seed: int = 0) -> list[str]:
    """Some neighbouring words of each text, as many as `PIECE` says, drawn by the seed."""
    draw, found = Random(seed), []
    for words in map(str.split, texts):
        n = min(len(words), draw.randint(*PIECE))
        begin = draw.randint(0, len(words) - n)
        found.append(" ".join(words[begin : begin + n]))
    return found


def _labelled(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(list(parts)), torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts]))


def _mlp(tensors: Mapping[str, Tensor], embeddings: Tensor) -> Tensor:
    x: Tensor = F.normalize(embeddings.float(), dim=-1) * embeddings.shape[-1] ** 0.5
    for n in range(1, LAYERS + 1):
        x = F.linear(x, tensors[f"W{n}"], tensors[f"b{n}"])
        x = x.relu() if n < LAYERS else x
    return x
