"""polytask: one frozen language model, many tasks.

base  = pt.load("minilm")
task  = pt.Task.read("tickets.csv", input="text", output="team")
skill = pt.adapt(base, task)
lib   = pt.Library("skills"); lib.add(skill)
lib.answer("my card was charged twice")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# What a newcomer needs, by the module it lives in. Imported when first asked for, so that `import polytask` is fast.
_HOMES = {
    "Adapter": "polytask.adapters",
    "Ask": "polytask.inference",
    "Backbone": "polytask.backbones",
    "Engine": "polytask.inference",
    "Example": "polytask.tasks",
    "Expression": "polytask.adapters.expression",
    "Library": "polytask.skills",
    "PolytaskError": "polytask.errors",
    "Reading": "polytask.recipes",
    "Request": "polytask.inference",
    "Sampling": "polytask.inference",
    "Settings": "polytask.training",
    "Task": "polytask.tasks",
    "UsageError": "polytask.errors",
    "adapt": "polytask.recipes",
    "adapt_many": "polytask.recipes",
    "as_lora": "polytask.composition.low_rank",
    "load": "polytask.backbones",
    "merge": "polytask.composition.merge",
    "bare": "polytask.adapters.expression",
    "ensemble": "polytask.adapters.expression",
    "mix": "polytask.adapters.expression",
    "parallel": "polytask.adapters.expression",
    "pipeline": "polytask.adapters.expression",
    "split": "polytask.adapters.expression",
    "stack": "polytask.adapters.expression",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from polytask.adapters import Adapter
    from polytask.adapters.expression import Expression, bare, ensemble, mix, parallel, pipeline, split, stack
    from polytask.backbones import Backbone, load
    from polytask.composition.low_rank import as_lora
    from polytask.composition.merge import merge
    from polytask.errors import PolytaskError, UsageError
    from polytask.inference import Ask, Engine, Request, Sampling
    from polytask.recipes.adapt import adapt, adapt_many
    from polytask.recipes.reading import Reading
    from polytask.skills import Library
    from polytask.tasks import Example, Task
    from polytask.training import Settings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'polytask' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
