"""The probe of frozen features: scikit-learn's minimum, ridge regression, and the penalty by the score."""

from __future__ import annotations

import numpy as np
import torch
from jobs import task_of
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from polytask.adapters import HeadCard
from polytask.backbones import Backbone, heads
from polytask.methods import passes
from polytask.tasks import Task
from polytask.training import probe


def features_of(task: Task, backbone: Backbone, head: HeadCard) -> Tensor:
    return torch.stack(passes.features(backbone, head, passes.encode(backbone, head, task.train)))


def test_the_probe_is_scikit_learns_minimum(backbone):
    task = task_of(n=200, length=40)
    head = heads.design(task, pool="first")
    φ = features_of(task, backbone, head)
    y = torch.tensor(["abcd".index(str(e.output)) for e in task.train])
    zero = {"W": torch.zeros(4, 32), "b": torch.zeros(4)}
    λ = 1e-2
    p = probe.fit(head, φ.clone(), y, zero, lambda p: 0.0, penalties=[λ], steps=300)
    z = (φ - φ.mean(0)) / φ.std(0, correction=0)
    # mean loss + λ‖W‖² is scikit-learn's Σ loss + ‖W‖² / 2C at C = 1 / (2 λ n).
    theirs = LogisticRegression(C=1 / (2 * λ * len(z)), tol=1e-8, max_iter=3000).fit(z.numpy(), y.numpy())
    mine = (p["W"] * φ.std(0, correction=0)).numpy()
    assert np.allclose(mine - mine.mean(0), theirs.coef_ - theirs.coef_.mean(0), atol=2e-3)
    right = (heads.logits(p, φ).argmax(-1) == y).float().mean()
    assert right > 0.5  # chance is a quarter
    # The gradient of the objective is zero there.
    W, b = mine_in(p, φ)
    loss = heads.losses(head, z @ W.T + b, y).mean() + λ * W.square().sum()
    loss.backward()
    assert W.grad.abs().max() < 1e-4
    assert b.grad.abs().max() < 1e-4


def mine_in(p: dict[str, Tensor], φ: Tensor) -> tuple[Tensor, Tensor]:
    """The head in the coordinates of standardised features."""
    W = (p["W"] * φ.std(0, correction=0)).clone().requires_grad_()
    return W, (p["b"] + p["W"] @ φ.mean(0)).clone().requires_grad_()


def test_the_probe_of_numbers_is_ridge_regression(backbone):
    task = task_of("regression", 150)
    head = heads.design(task)
    φ = features_of(task, backbone, head)
    y = torch.tensor([float(e.output) for e in task.train])
    first = {"W": torch.full((1, 32), 0.1), "b": torch.zeros(1)}
    λ = 1e-2
    p = probe.fit(head, φ.clone(), y, first, lambda p: 0.0, penalties=[λ], steps=300)
    σ, μ = φ.std(0, correction=0).double(), φ.mean(0).double()
    z, W0, n = (φ.double() - μ) / σ, first["W"][0].double() * σ, len(y)
    residual = y.double() - y.double().mean() - z @ W0
    W = W0 + torch.linalg.solve(z.T @ z / n + λ * torch.eye(32).double(), z.T @ residual / n)
    torch.testing.assert_close(p["W"][0].double() * σ, W, rtol=1e-3, atol=1e-3)
    assert float((heads.logits(p, φ)[:, 0] - y).square().mean()) < float(y.var()) / 2


def test_the_probe_chooses_its_penalty_by_the_score(backbone):
    task = task_of(n=60, length=40)
    head = heads.design(task)
    φ = features_of(task, backbone, head)
    y = torch.tensor(["abcd".index(str(e.output)) for e in task.train])
    first = heads.start(head, 32, 0)
    sizes: list[float] = []

    def small(p: dict[str, Tensor]) -> float:
        sizes.append(float(p["W"].norm()))
        return -sizes[-1]

    p = probe.fit(head, φ.clone(), y, first, small)
    assert float(p["W"].norm()) == min(sizes)
    assert len(set(sizes)) == len(probe.PENALTIES)
