"""K-Adapters together: the equation against each one's own states, the pass that they share, training and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from jobs import job_of, task_of
from test_kadapter import base, shaken, states, untouched  # noqa: F401  # the fixture holds here too
from test_opamp import as_in_whole_passes, prompts_of
from torch import Tensor
from writers import refused

from polytask.adapters import Adapter
from polytask.composition.learned.kadapters import KAdapters
from polytask.inference import Engine, Request
from polytask.methods import build
from polytask.methods.kadapter import KAdapter
from polytask.methods.lifting import Active, Plan
from polytask.recipes.adapt import adapt


def two(backbone: Any) -> list[Active]:
    """Adapters that read other states, by layers of other kinds."""
    return [shaken(backbone, None, 1), shaken(backbone, KAdapter(width=0.5, heads=2, inner=1, sites=("-1",)), 2)]


def joined(backbone: Any, sources: list[Active], tensors: dict[str, Tensor] | None = None) -> Active:
    method = KAdapters(over=("a", "b"))
    return Active.of(method, tensors or method.start(backbone, 0), sources)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_heads_read_the_sum_of_what_each_makes(family: str) -> None:
    """H = f₁ W₁ᵀ + f₂ W₂ᵀ + b, where f_n are the states with adapter n alone; and their mean at first."""
    backbone, batch = base(family), tiny.batch(3)
    sources = two(backbone)
    f = [states(backbone, [one], batch)[batch.mask] for one in sources]
    first = states(backbone, [joined(backbone, sources)], batch)[batch.mask]
    torch.testing.assert_close(first, (f[0] + f[1]) / 2, rtol=1e-4, atol=1e-4)
    draw, d = torch.Generator().manual_seed(0), backbone.hidden_size
    W, b = torch.randn(d, 2 * d, generator=draw), torch.randn(d, generator=draw)
    found = states(backbone, [joined(backbone, sources, {"shared/W": W, "shared/b": b})], batch)[batch.mask]
    torch.testing.assert_close(found, f[0] @ W[:, :d].T + f[1] @ W[:, d:].T + b, rtol=1e-3, atol=1e-3)


def test_all_stand_beside_one_pass() -> None:
    backbone, batch = base("bert"), tiny.batch(3)
    passes: list[int] = []
    handle = backbone.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    states(backbone, [joined(backbone, two(backbone))], batch)
    handle.remove()
    assert len(passes) == 1


def test_what_is_written_with_a_cache_is_what_whole_passes_say() -> None:
    backbone = base("llama", writes=True)
    plan = Plan(backbone, [joined(backbone, two(backbone)), two(backbone)[0]])
    with torch.no_grad():
        as_in_whole_passes(plan, prompts_of(9, torch.cat([torch.eye(2), torch.zeros(1, 2)])), 3)


def test_it_is_trained_kept_and_answers(tmp_path: Path) -> None:
    backbone, task = base("bert"), task_of(n=24, metric="accuracy")
    settings = job_of(task, epochs=2, lr=2e-3).settings
    sources = [
        adapt(
            backbone,
            task_of(n=24, seed=seed, metric="accuracy"),
            "kadapter",
            hyperparameters={"heads": 4, "inner": 1},
            settings=settings,
        )
        for seed in (1, 2)
    ]
    before = [{n: t.clone() for n, t in one.tensors.items()} for one in sources]
    made = adapt(backbone, task, "kadapters", settings=settings, over=sources)
    assert all(torch.equal(t, old[n]) for one, old in zip(sources, before, strict=True) for n, t in one.tensors.items())
    d = backbone.hidden_size
    head = sum(t.numel() for n, t in made.tensors.items() if n.startswith("head/"))
    assert made.card.trained_parameters == 2 * d * d + d + head
    assert not torch.equal(made.tensors["shared/W"], torch.eye(d).repeat(1, 2) / 2)
    assert made.needs == tuple(one.id for one in sources)
    made.save(tmp_path / "made")
    texts = [Request(text, adapter=made.id) for text in ("a b c", "h g e f")]
    first, again = (
        Engine(backbone, adapters=[*sources, each]).answer(texts) for each in (made, Adapter.load(tmp_path / "made"))
    )
    assert [a.probability for a in first] == [a.probability for a in again]


def test_it_joins_nothing_else() -> None:
    backbone, task = base("bert"), task_of(n=24, metric="accuracy")
    settings = job_of(task, epochs=1).settings
    lora = adapt(backbone, task, "lora", settings=settings)
    refused(
        lambda: adapt(backbone, task, "kadapters", settings=settings, over=[lora]),
        "kadapters joins adapters by kadapter, and this is by lora",
    )
    refused(lambda: build("kadapters", {"over": ["a"]}).start(base("t5"), 0, writing=True), "a decoder that would read")
