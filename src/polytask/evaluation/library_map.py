"""What the adapters of a library have to do with each other: how alike they are, who is made of whom or grew from whom,
and who takes which input.

    c_st = cos(μ_s, μ_t)                                                  of the means μ of the tasks' inputs
    c_st = Σ_i ⟨ΔW_s,i, ΔW_t,i⟩ / (‖ΔW_s‖ ‖ΔW_t‖),   ΔW_i = s B_i A_i     of what two LoRAs change, over all sites i
    X = V₂ Λ₂^½   of   J C J = V Λ Vᵀ,   J = I − 1/N                      adapters in the plane
    x = ½ Λ₂⁻¹ Xᵀ (diag(J C J) − d²),   d² = 2 − 2 cos(e, μ)              an input among them

Classical scaling: Torgerson 1952, Multidimensional scaling I, on the distances d² = 2 − 2c between vectors of length 1;
a point that is added: Gower 1968. ⟨B_s A_s, B_t A_t⟩ is the sum of (B_sᵀ B_t) ∘ (A_s A_tᵀ), so that no ΔW is made.
Vectors of two backbones cannot be compared: each backbone has maps of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.adapters import Adapter
from polytask.composition.differences import Weighed, factors
from polytask.library import Entry, Library
from polytask.methods import build
from polytask.methods.lifting import Active
from polytask.methods.lora import LoRA

NEEDS = ("stands on", "is made of")
NEAREST = 3  # that are named for each adapter
WAY = re.compile(r"(\S.*?) (-?\d+\.\d{3})(?:, |$)")  # of a note by `polytask.recipes.reuse`


@dataclass(frozen=True)
class Link:
    """`then` `how` `first`, by id: stands on, is made of (it cannot run without), began with, was merged from, or was
    made from it."""

    first: str
    then: str
    how: str


@dataclass(frozen=True)
class Tried:
    """A way in which an adapter of the library was tried for a new task, `then`, by reuse: the mean log-likelihood of
    the task's examples, each held out. The first is the one that was taken."""

    then: str
    way: str
    score: float
    taken: bool


@dataclass(frozen=True)
class Map:
    """Adapters of one backbone by id in the plane. `by`: tasks or changes. `shown`: the share of squared distances that
    the plane keeps. `cosines` [N, N] in the order of `places`. `inputs`: where the routed inputs stand, if they do."""

    backbone: str
    by: str
    places: Mapping[str, tuple[float, float]]
    shown: float
    cosines: Tensor
    inputs: tuple[tuple[float, float], ...] = ()

    def nearest(self, id: str) -> list[tuple[str, float]]:
        """The adapters most like this one with their cosines, best first; none where it is not on the map."""
        ids = list(self.places)
        if id not in self.places:
            return []
        row = self.cosines[ids.index(id)].tolist()
        others = [(other, c) for other, c in zip(ids, row, strict=True) if other != id]
        return sorted(others, key=lambda found: -found[1])[:NEAREST]


@dataclass(frozen=True)
class Input:
    """A text (a pair has two) and who takes it by id with their weights, the best first; `sure` as the router says."""

    text: str
    weights: Mapping[str, float]
    sure: float


@dataclass(frozen=True)
class Routing:
    """What a router did with inputs, whose embeddings by the backbone with this `fingerprint` are [R, d]."""

    router: str
    fingerprint: str
    inputs: tuple[Input, ...]
    embeddings: Tensor

    def taken(self) -> dict[str, float]:
        """How many inputs each adapter took, by id, the most first: a mixture's count by their weights."""
        found: dict[str, float] = {}
        for one in self.inputs:
            whole = sum(map(abs, one.weights.values()))
            for id, weight in one.weights.items():
                found[id] = found.get(id, 0.0) + abs(weight) / whole
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Picture:
    """All of it. `gains`: the metric, the score on the test split, and that of frozen features alone, by id."""

    location: str
    entries: tuple[Entry, ...]
    links: tuple[Link, ...]
    tried: tuple[Tried, ...]
    gains: Mapping[str, tuple[str, float, float]]
    maps: tuple[Map, ...]
    routing: Routing | None = None

    @classmethod
    def of(cls, library: Library, routing: Routing | None = None) -> Picture:
        """Of the adapters that are in the library now. They are read one at a time, and LoRAs' factors kept."""
        entries = library.list()
        profiles: dict[str, Tensor] = {}
        loras: dict[str, Weighed] = {}
        links: list[Link] = []
        tried: list[Tried] = []
        gains: dict[str, tuple[str, float, float]] = {}
        here = {entry.id for entry in entries}
        for entry in entries:
            one = library.get(entry.id)
            links += [link for link in _links(one) if link.first in here]
            tried += _tried(one)
            if {"test", "baseline"} <= one.card.scores.keys():
                test, before = one.card.scores["test"], one.card.scores["baseline"]
                gains[one.id] = (test.metric, test.value, before.value)
            mean = one.at("task").get("mean")
            if mean is not None and bool(mean.any()):
                profiles[one.id] = F.normalize(mean.double(), dim=0)
            if one.method == LoRA.name:
                loras[one.id] = Weighed(one, Active.of(build(one.method, one.hyperparameters), one.tensors), 1.0)
        maps = []
        for fingerprint in dict.fromkeys(entry.fingerprint for entry in entries):
            own = [entry.id for entry in entries if entry.fingerprint == fingerprint]
            backbone = next(entry.backbone for entry in entries if entry.fingerprint == fingerprint)
            placed = [id for id in own if id in profiles]
            if len(placed) > 1:
                μ = torch.stack([profiles[id] for id in placed])
                given = routing.embeddings if routing and routing.fingerprint == fingerprint else None
                maps.append(_map(backbone, "tasks", placed, μ @ μ.T, None if given is None else _cosines(given, μ)))
            changed, cosines = changes([loras[id] for id in own if id in loras])
            if len(changed) > 2:
                maps.append(_map(backbone, "changes", changed, cosines))
        return cls(str(library.location), entries, tuple(links), tuple(tried), gains, tuple(maps), routing)

    def needed(self, id: str) -> list[Link]:
        return [link for link in self.links if link.then == id and link.how in NEEDS]

    def json(self) -> dict[str, Any]:
        """All that the page shows, for programs."""
        return {
            "library": self.location,
            "adapters": [
                {
                    "adapter": entry.id,
                    "name": entry.name,
                    "version": entry.version,
                    "base": entry.backbone,
                    "kind": entry.kind,
                    "method": entry.method,
                    "metric": entry.metric,
                    "score": entry.score,
                    "frozen_features": self.gains[entry.id][2] if entry.id in self.gains else None,
                    "needs": [link.first for link in self.needed(entry.id)],
                    "nearest": {found.by: dict(found.nearest(entry.id)) for found in self.maps},
                }
                for entry in self.entries
            ],
            "links": [asdict(link) for link in self.links],
            "tried": [asdict(way) for way in self.tried],
            "maps": [
                {"base": found.backbone, "by": found.by, "shown": found.shown, "places": found.places}
                for found in self.maps
            ],
            "routing": None
            if self.routing is None
            else {
                "router": self.routing.router,
                "taken": self.routing.taken(),
                "inputs": [
                    {"input": one.text, "adapters": one.weights, "sure": one.sure} for one in self.routing.inputs
                ],
            },
        }


def changes(loras: Sequence[Weighed]) -> tuple[list[str], Tensor]:
    """The ids of those that change something, and the cosines of their ΔW over all sites, [N, N]."""
    G = torch.zeros(len(loras), len(loras), dtype=torch.float64)
    for at in dict.fromkeys(at for source in loras for at in source.active.at):
        there = [k for k, source in enumerate(loras) if at in source.active.at]
        A, B = factors([loras[k] for k in there], [1.0] * len(there), at)
        ranks = [loras[k].active.at[at]["A"].shape[0] for k in there]
        of = torch.zeros(len(there), sum(ranks), dtype=torch.float64)  # which ranks are whose
        of[torch.arange(len(there)).repeat_interleave(torch.tensor(ranks)), torch.arange(sum(ranks))] = 1
        k = torch.tensor(there)
        G[k[:, None], k] += of @ ((B.T @ B) * (A @ A.T)) @ of.T
    some = [k for k in range(len(loras)) if G[k, k] > 0]
    norms = G.diagonal()[some].sqrt()
    return [loras[k].adapter.id for k in some], G[some][:, some] / norms / norms[:, None]


def plane(C: Tensor, e: Tensor | None = None) -> tuple[Tensor, float, Tensor]:
    """Of cosines C [N, N] and those of other vectors to the same, e [R, N]: X [N, 2], the share of squared distances
    that it keeps, and the places of the others [R, 2]."""
    centred = C - C.mean(0) - C.mean(1)[:, None] + C.mean()
    λ, V = torch.linalg.eigh(centred)
    λ, V = λ.flip(0).clamp(min=0.0), V.flip(1)
    V = V * torch.where(V.gather(0, V.abs().argmax(0)[None]) < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
    found = torch.zeros(len(C), 2, dtype=torch.float64)
    k = min(2, int((λ > 1e-9).sum()))
    found[:, :k] = V[:, :k] * λ[:k].sqrt()
    others = torch.zeros(0 if e is None else len(e), 2, dtype=torch.float64)
    if e is not None:
        others[:, :k] = 0.5 * (centred.diagonal() - (2 - 2 * e)) @ found[:, :k] / λ[:k]
    return found, float(λ[:2].sum() / λ.sum()) if float(λ.sum()) > 1e-9 else 1.0, others


def _map(backbone: str, by: str, ids: Sequence[str], C: Tensor, e: Tensor | None = None) -> Map:
    X, shown, others = plane(C, e)
    points = [(x, y) for x, y in X.tolist()]
    return Map(backbone, by, dict(zip(ids, points, strict=True)), shown, C, tuple((x, y) for x, y in others.tolist()))


def _cosines(embeddings: Tensor, μ: Tensor) -> Tensor:
    return F.normalize(embeddings.double(), dim=-1) @ μ.T


def _links(one: Adapter) -> list[Link]:
    said = str(one.card.recipe.get("recipe", ""))
    grown = {"adapt": "began with", "merge": "was merged from"}.get(said, "was made from")
    over: Sequence[str] = one.hyperparameters.get("over", ())
    found = dict.fromkeys(one.card.lineage.parents, grown)
    found |= dict.fromkeys(over, "is made of") | dict.fromkeys(one.above, "stands on")
    return [Link(first, one.id, how) for first, how in found.items()]


def _tried(one: Adapter) -> list[Tried]:
    """What `polytask.recipes.reuse` wrote down of the ways it tried: the one it took first."""
    for note in one.card.notes:
        if note.startswith("reuse took "):
            ways = WAY.findall(note.partition(" ways: ")[2])
            return [Tried(one.id, way, float(score), i == 0) for i, (way, score) in enumerate(ways)]
    return []
