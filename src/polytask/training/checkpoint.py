"""Training that was interrupted goes on to the same end.

A checkpoint is one safetensors file: every learner's tensors, its best tensors, AdamW's moments, and in the header
the step counts, scores, history and the state of the random numbers. It replaces the last one in one rename, so that
`kill -9` at any moment leaves a whole checkpoint behind.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polytask.errors import PolytaskError

if TYPE_CHECKING:
    from polytask.training.learner import Learner

FILE = "training.safetensors"


def found(folder: Path) -> bool:
    return (folder / FILE).is_file()


def save(folder: Path, learners: Sequence[Learner], fingerprint: str) -> None:
    """Write the state of all learners; the one before it stays until this one is whole."""
    from safetensors.torch import save as to_bytes

    tensors: dict[str, Tensor] = {"random": torch.get_rng_state()}
    says = []
    for i, learner in enumerate(learners):
        says.append(
            {
                "job": describe(learner, fingerprint),
                "method": learner.method.hyperparameters(),
                "step": learner.step,
                "stale": learner.stale,
                "best": learner.best,
                "probe": learner.probe,
                "history": learner.history,
                "losses": learner.losses,
                "seconds": learner.seconds,
                "done": learner.done,
            }
        )
        for kind, group in (
            ("now", learner.tensors),
            ("best", learner.best_tensors),
            ("probe", learner.probe_tensors),
            ("share", learner.shares),
        ):
            # Copies: safetensors refuses two names for one storage, and learners may share tensors.
            tensors |= {f"{i}/{kind}/{name}": t.detach().cpu().clone().contiguous() for name, t in group.items()}
        if learner.optimiser is not None:
            for name, tensor in learner.tensors.items():
                for moment, value in learner.optimiser.state.get(tensor, {}).items():
                    tensors[f"{i}/{moment}/{name}"] = value.detach().cpu().reshape(value.shape).contiguous()
    data = to_bytes(tensors, {"learners": json.dumps(says)})
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{FILE}.{os.getpid()}"
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / FILE)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise PolytaskError(f"{folder}: the checkpoint could not be written: {error.strerror}") from error


def restore(folder: Path, learners: Sequence[Learner], fingerprint: str, prepare: Callable[[], None]) -> None:
    """Put the learners back to where the checkpoint was made; `prepare` gives those with their tensors optimisers.
    PolytaskError where it is of other work or damaged."""
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:
            says = json.loads(file.metadata()["learners"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise PolytaskError(f"{path}: not a whole checkpoint ({error}); remove it to start anew") from error
    if [s["job"] for s in says] != [describe(learner, fingerprint) for learner in learners]:
        raise PolytaskError(
            f"{path}: a checkpoint of other work (task, data, method or settings); remove it, or name another folder"
        )
    for i, (learner, state) in enumerate(zip(learners, says, strict=True)):
        learner.step, learner.stale, learner.best = state["step"], state["stale"], state["best"]
        learner.probe, learner.history, learner.seconds = state["probe"], state["history"], state["seconds"]
        learner.losses, learner.done = state["losses"], state["done"]
        learner.method = type(learner.method).of(state["method"])
        device = next(iter(learner.tensors.values())).device
        order = list(learner.tensors)
        for kind, field in (
            ("now", "tensors"),
            ("best", "best_tensors"),
            ("probe", "probe_tensors"),
            ("share", "shares"),
        ):
            prefix = f"{i}/{kind}/"
            kept = {n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)}
            setattr(learner, field, {n: kept[n] for n in order if n in kept})
    prepare()
    for i, learner in enumerate(learners):
        if learner.optimiser is not None and not learner.done:
            for name, tensor in learner.tensors.items():
                learner.optimiser.state[tensor] = {
                    moment: tensors[f"{i}/{moment}/{name}"].to(tensor.device)
                    for moment in ("step", "exp_avg", "exp_avg_sq")
                    if f"{i}/{moment}/{name}" in tensors
                }
    torch.set_rng_state(tensors["random"])


def describe(learner: Learner, fingerprint: str) -> str:
    """What has to be the same for a checkpoint to be this job's."""
    job = learner.job
    card = job.task.card()
    return json.dumps(
        [
            job.method.name,
            job.method.hyperparameters(),
            [job.selector.name, job.selector.hyperparameters()] if job.selector else None,
            job.begin.id if job.begin else None,
            job.head.model_dump(mode="json"),
            vars(job.settings),
            card.sha256,
            fingerprint,
        ]
        + ([hashlib.sha256(job.soft.numpy().tobytes()).hexdigest()] if job.soft is not None else []),
        sort_keys=True,
    )
