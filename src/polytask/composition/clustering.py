"""MBC, model-based clustering: adapters that look alike belong to tasks that can share one.

    θ_t ← all tensors of adapter t, numbers up to the q-quantile of |θ_t| set to 0
    e_t = SVD_d(θ)_t / ‖SVD_d(θ)_t‖,   S_st = e_sᵀ e_t,   k-means over the rows of S

Ostapenko, Su, Ponti, Charlin, Le Roux, Pereira, Caccia, Sordoni 2024, arXiv 2405.11157. The tensors are the adapters'
own (A and B, not their product), in one order; q = 0.5 and at most d = 64 dimensions as in the authors' script. For
each cluster the paper trains one new adapter on all of its tasks' data, and routes among these by Arrow.

Adapters are alike only where they began alike: train them from one seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polytask.adapters import Adapter
from polytask.errors import UsageError

KIND = "composition"
NAME = "mbc"
PLACE = "library"
EQUATION = "k-means over the rows of cos(e_s, e_t), e = SVD of sparsified adapter tensors"
PAPER = "Ostapenko et al. 2024, arXiv 2405.11157"


def clusters(
    adapters: Sequence[Adapter], k: int = 10, *, q: float = 0.5, dimensions: int = 64, seed: int = 42
) -> tuple[tuple[str, ...], ...]:
    """The adapters' ids in k clusters, in the order of their first members.

    q: the share of numbers that do not count. dimensions: d. Raises UsageError where there are fewer adapters than
    clusters, or their tensors differ in name or shape.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD

    if not 1 <= k <= len(adapters):
        raise UsageError(
            f"{k} clusters of {len(adapters)} adapters: at least one cluster, each with an adapter, is needed"
        )
    if not 0 <= q < 1:
        raise UsageError(f"q = {q:g}: a share of numbers from 0 to below 1 is needed")
    own = [{n: t for n, t in one.tensors.items() if not n.startswith(("head/", "task/"))} for one in adapters]
    first = {n: t.shape for n, t in own[0].items()}
    for one, tensors in zip(adapters, own, strict=True):
        if {n: t.shape for n, t in tensors.items()} != first:
            raise UsageError(
                f"{one.name} and {adapters[0].name} have other tensors; adapters of one method, rank and sites can be "
                "clustered"
            )
    θ = torch.stack([torch.cat([tensors[n].flatten().float() for n in sorted(first)]) for tensors in own])
    least = [float(row.abs().kthvalue(max(1, round(q * len(row)))).values) if q else -1.0 for row in θ]
    θ = θ * (θ.abs() > torch.tensor(least)[:, None])
    d = min(dimensions, *θ.shape)
    e = torch.from_numpy(TruncatedSVD(d, n_iter=5, n_oversamples=10, random_state=seed).fit_transform(θ.numpy()))
    e = torch.nn.functional.normalize(e, dim=-1)
    found = KMeans(k, init="k-means++", n_init=10, random_state=seed).fit_predict((e @ e.T).numpy())
    groups: dict[int, list[str]] = {}
    for one, cluster in zip(adapters, found.tolist(), strict=True):
        groups.setdefault(cluster, []).append(one.id)
    return tuple(map(tuple, groups.values()))
