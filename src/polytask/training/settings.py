"""How long, how fast and in which order an adapter is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from polytask.adapters import Adapter, HeadCard
from polytask.errors import UsageError
from polytask.methods import Method
from polytask.methods.lifting import Active, Terms
from polytask.methods.selectors import Selector
from polytask.tasks import Task

# Peak learning rate by method, for AdamW with the head warm-started from a probe; the values that did best on the
# validation splits of the development tasks with the embedded encoder, whose width is WIDTH; of LoReFT, OpAmp, Bitune,
# K-Adapter, ScaLearn and aTLAS their authors' at this width. Wider models need smaller ones: the rate falls as
# 1 / width, as for hidden weights in Yang et al. 2022 (arXiv 2203.03466).
WIDTH = 384
LEARNING_RATES = {
    "lora": 2e-3,
    "dora": 2e-3,
    "kasa": 2e-3,
    "pissa": 2e-3,
    "smora": 2e-3,
    "elastic": 1e-3,
    "bottleneck": 1e-3,
    "pfeiffer": 1e-3,
    "parallel": 1e-3,
    "compacter": 3e-3,
    "ia3": 1e-2,
    "bitfit": 1e-2,
    "lofit": 1e-2,
    "rotation": 1e-2,
    "prompt": 1e-2,
    "ptuning": 1e-3,
    "ept": 1e-2,
    "prefix": 1e-2,
    "aligner": 1e-2,
    "loreft": 5e-3,
    "p_adapter": 1e-3,
    "p_adapter_prefix": 1e-3,
    "bitune": 1e-3,
    "reprogram": 1e-4,  # a step moves a symbol by the rate times Σ|E| over the vocabulary
    "opamp": 2e-3,
    "flare": 2e-3,
    "mor1e": 2e-3,
    "task_experts": 2e-3,
    "kadapter": 1e-4,
    "full": 1e-4,
    "fusion": 1e-3,
    "scalearn": 6e-3,
    "scalearn_uniform": 6e-3,
    "atlas": 1e-1,
    "meteora": 2e-3,
    "task_moe": 1e-1,
    "bam": 2e-3,
}


@dataclass(frozen=True)
class Settings:
    """lr: peak rate of the method's tensors (None: the method's own default, less for wide models). head_lr: of the
    head's. epochs: at most (None: about 400 steps' worth, from 5 to 20). batch: examples a step. warmup: share of the
    steps over which the rate rises, before it falls to zero in a straight line. weight_decay: AdamW's, on the method's
    tensors. clip: largest gradient norm. patience: evaluations without a better validation score before it stops.
    balanced: weigh classes by their rarity. limit: tokens a text is cut to (None: 256, and 512 for a prompt with its
    answer).
    """

    lr: float | None = None
    head_lr: float = 1e-3
    epochs: int | None = None
    batch: int = 32
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip: float = 1.0
    patience: int = 5
    balanced: bool = False
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} = {value}: at least 1 is needed")
        if self.lr is not None and not 0 < self.lr < 10:
            raise UsageError(f"lr = {self.lr}: a number between 0 and 10 is needed")

    def rounds(self, steps: int) -> int:
        """How many epochs of so many steps."""
        return self.epochs if self.epochs is not None else min(20, max(5, round(400 / steps)))

    @property
    def tokens(self) -> int:
        """What a text that a head reads is cut to."""
        return self.limit or 256

    def rate(self, method: str, width: int = WIDTH) -> float:
        """The peak rate of a method's tensors, on a backbone whose hidden states have `width` features; the least of
        those of several methods `a+b`."""
        if self.lr is not None:
            return self.lr
        return min(LEARNING_RATES.get(one, 1e-3) for one in method.split("+")) * min(1.0, WIDTH / width)


@dataclass(frozen=True)
class Job:
    """One adapter to train: a task, a method, a head, and how; `selector` chooses what of the method is trained.
    `begin` is an adapter of the method whose tensors it begins with. It is trained `above` what these do, and
    `sources` are what a composed method is made of. `soft` [N, C] says for each training example how much each class
    counts, in place of its output, which need not be known then: the loss is −Σ_c soft_c log p_c."""

    task: Task
    method: Method
    head: HeadCard
    settings: Settings = field(default_factory=Settings)
    selector: Selector | None = None
    begin: Adapter | None = None
    above: tuple[Terms, ...] = ()
    sources: tuple[Active, ...] = ()
    soft: Tensor | None = field(default=None, compare=False)
