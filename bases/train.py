"""Step 3: train. One GPU or a CPU, in pieces of any length; the same seed gives the same model, however it was cut.

    python -m bases.train --size base  --probe                               # which setting is fast and stable here
    python -m bases.train --size base  --tokens 2e9 --minutes 9 --resume     # say it again until it says "done"
    python -m bases.train --size small --tokens 6e7 --minutes 180            # a CPU

The loss: every token of plain text counts 1, every token of an answer 1, and a token of a task's prompt 0.1. A model
that is only asked for answers does not learn to read what it is asked, and the prompts are most of the in-domain text
there is; one that weighs all tokens alike spends nine tenths of its task tokens on definitions that repeat.

The learning rate: warm-up, stable, decay to zero over the last fifth (WSD; Hu et al. 2024, arXiv 2404.06395), because
the stable part does not depend on how long the run will be: `--tokens` may be changed until the decay begins.

Weights are float32; where the processor has bfloat16 the arithmetic is in it (autocast), which needs no loss scale.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from bases.data import SHARES
from bases.packing import ANSWER, PROMPT, TEXT, Batch, Cache, Stream

# Deep and narrow, as small models do best (Liu et al. 2024, MobileLLM, arXiv 2402.14905); heads of 64; a third or half
# as many key-value heads, for a smaller cache when 32 rows decode; tied embeddings, which are a seventh to a quarter
# of the model as it is. `base`: 22.0 M parameters; `small`: 8.0 M, for a CPU; `tiny`: for tests.
#                 width  layers  heads  key-value heads  feed-forward
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "base": (384, 12, 6, 2, 1024),
    "small": (256, 8, 4, 2, 704),
    "tiny": (32, 2, 2, 1, 64),
}
LENGTH = {"cuda": 1024, "cpu": 512}  # tokens of a row
ROWS = {"cuda": 64, "cpu": 8}  # rows of a micro-batch
ACCUMULATE = {"cuda": 2, "cpu": 2}  # micro-batches of a step: 131,072 and 8,192 tokens
WEIGHT = {TEXT: 1.0, PROMPT: 0.1, ANSWER: 1.0}


@dataclass(frozen=True)
class Settings:
    """What decides about the result; a checkpoint keeps it, and a resumed run takes it from there."""

    size: str = "base"
    tokens: float = 2e9  # to see in all
    length: int = 1024
    rows: int = 64
    accumulate: int = 2
    lr: float = 2e-3  # at the peak
    warmup: int = 200  # steps
    decay: float = 0.2  # of all steps
    optimiser: str = "muon"  # of the blocks' matrices, or adamw as of the rest
    weight_decay: float = 0.1  # on the blocks' matrices
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    precision: str = "bf16"  # or fp32
    attention: str = "sdpa"  # or flex: block-sparse, a GPU only
    compile: bool = False

    @property
    def step_tokens(self) -> int:
        """Places for tokens in one step; a hundredth of them is padding."""
        return self.rows * self.length * self.accumulate

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.tokens / self.step_tokens))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        decayed = max(1, round(self.decay * self.steps))
        return self.lr * min((step + 1) / max(1, self.warmup), 1.0, (self.steps - step) / decayed)


@dataclass
class State:
    """Where a run is."""

    step: int = 0
    tokens: int = 0  # predicted so far, without padding
    seconds: float = 0.0
    at: tuple[int, int] = (0, 0)  # pass, row
    optimisers: list[tuple[int, str]] = field(default_factory=list)  # from which step on which
    curve: list[list[float]] = field(
        default_factory=list
    )  # step, tokens, then nats per token of text, prompts, answers
    sums: list[list[float]] = field(
        default_factory=lambda: [[0.0] * 3, [0.0] * 3]
    )  # nats and counts since its last point


# --- the model ------------------------------------------------------------------------------------


def build(settings: Settings, vocabulary: int, pad: int, end: int) -> LlamaForCausalLM:
    """An untrained model; maps into the residual stream start smaller the deeper it is, as in GPT-2."""
    torch.manual_seed(settings.seed)
    width, layers, heads, kv_heads, feed_forward = SIZES[settings.size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=settings.length,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=end,
        use_cache=True,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=feed_forward,
    )
    config._attn_implementation = "flex_attention" if settings.attention == "flex" else "sdpa"
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(math.sqrt(2 * config.num_hidden_layers))
    return model


def mask_of(document: Tensor, attention: str) -> Any:
    """Who sees whom: what came before in the same document. [rows, 1, length, length], True where seen."""
    rows, length = document.shape
    if attention == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (document[b, q] == document[b, k])

        return create_block_mask(seen, rows, None, length, length, device=document.device, _compile=True)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=document.device).tril()


def token_losses(model: Any, batch: Batch, attention: str = "sdpa") -> Tensor:
    """Nats for each target of a batch, 0 where there is none: [rows, length] float32."""
    logits = model(
        input_ids=batch.tokens,
        position_ids=batch.position,
        attention_mask=mask_of(batch.document, attention),
        use_cache=False,
    ).logits
    target = batch.target.masked_fill(batch.part < 0, -100)
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view_as(target)


def weights_of(part: Tensor) -> Tensor:
    """How much each target counts."""
    table = torch.tensor([WEIGHT[TEXT], WEIGHT[PROMPT], WEIGHT[ANSWER], 0.0], device=part.device)
    return table[part]  # -1 is the last


def arithmetic(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 by autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def has_bf16(device: torch.device) -> bool:
    """Whether the processor computes in bfloat16, and not only converts."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# --- the loop -------------------------------------------------------------------------------------


class Trainer:
    """Model, optimiser and place in the stream."""

    def __init__(self, settings: Settings, cache: Cache, *, vocabulary: int, pad: int, end: int, device: str) -> None:
        self.settings, self.cache, self.pad, self.device = settings, cache, pad, torch.device(device)
        self.state = State()
        self.model = build(settings, vocabulary, pad, end).to(self.device)
        named = list(self.model.named_parameters())
        self.names = [name for name, _ in named]
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in named if p.ndim != 2 or "embed" in name]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimisers: list[torch.optim.Optimizer] = []
        if settings.optimiser == "muon":
            # Momentum made orthogonal (Jordan et al. 2024), its updates as large as AdamW's, so that one rate fits both
            # (Liu et al. 2025, arXiv 2502.16982).
            muon = torch.optim.Muon(groups[:1], lr=settings.lr, momentum=0.95, adjust_lr_fn="match_rms_adamw")
            self.optimisers.append(muon)
            groups = groups[1:]
        self.optimisers.append(torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True))
        self.state.optimisers.append((0, settings.optimiser))
        self.forward = torch.compile(self.model) if settings.compile else self.model

    def batches(self) -> Iterator[list[tuple[Batch, tuple[int, int]]]]:
        """The micro-batches of each next step; on a GPU, made while it computes."""
        s = self.settings
        stream = Stream(self.cache, SHARES, length=s.length, rows=s.rows, seed=s.seed, pad=self.pad, at=self.state.at)
        steps = zip(*[iter(stream)] * s.accumulate, strict=False)
        if self.device.type == "cpu":
            yield from map(list, steps)
            return
        ready: queue.Queue[list[tuple[Batch, tuple[int, int]]] | BaseException] = queue.Queue(4)

        def prepare() -> None:
            try:
                for step in steps:
                    ready.put(list(step))
            except BaseException as error:  # handed over: a thread that dies in silence leaves the loop waiting
                ready.put(error)

        threading.Thread(target=prepare, daemon=True).start()
        while True:
            step = ready.get()
            if isinstance(step, BaseException):
                raise step
            yield step

    def step(self, micro: list[tuple[Batch, tuple[int, int]]]) -> tuple[Tensor, Tensor]:
        """One update; the summed nats and the counts of text, prompt and answer tokens, on the device."""
        s = self.settings
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = s.rate(self.state.step)
        whole = sum(float(weights_of(batch.part).sum()) for batch, _ in micro)
        nats, counts = torch.zeros(3, device=self.device), torch.zeros(3, device=self.device)
        for cpu_batch, _ in micro:
            batch = cpu_batch.to(self.device)
            with arithmetic(s.precision, self.device):
                losses = token_losses(self.forward, batch, s.attention)
            ((losses * weights_of(batch.part)).sum() / whole).backward()
            for part in (TEXT, PROMPT, ANSWER):
                here = batch.part == part
                nats[part] += (losses.detach() * here).sum()
                counts[part] += here.sum()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.tokens += sum(int((batch.part >= 0).sum()) for batch, _ in micro)
        self.state.at = micro[-1][1]
        return nats, counts

    def run(self, *, minutes: float = math.inf, report: int = 50, out: Path | None = None, every: float = 5) -> bool:
        """Train until all tokens are seen, `minutes` are over or SIGTERM comes; whether all are seen.

        A line and a point of the curve each `report` steps; a checkpoint in `out` each `every` minutes and at the end.
        """
        stop = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: stop.set()) if _main_thread() else None
        start = saved = mark = time.monotonic()
        spent, tokens = self.state.seconds, self.state.tokens
        sums = torch.tensor(self.state.sums, device=self.device)
        for micro in self.batches():
            if stop.is_set() or self.state.step >= self.settings.steps or time.monotonic() - start > minutes * 60:
                break
            sums += torch.stack(self.step(micro))
            self.state.seconds = spent + time.monotonic() - start
            if self.state.step % report == 0:
                nats, counts = sums.tolist()
                mean = [round(n / c, 4) if c else math.nan for n, c in zip(nats, counts, strict=True)]
                self.state.curve.append([self.state.step, self.state.tokens, *mean])
                sums.zero_()
                now = time.monotonic()
                speed = (self.state.tokens - tokens) / (now - mark)
                mark, tokens = now, self.state.tokens
                text, prompt, answer = mean
                print(
                    f"step {self.state.step:>6}/{self.settings.steps}  text {text:.3f}  prompts {prompt:.3f}  "
                    f"answers {answer:.3f}  lr {self.settings.rate(self.state.step - 1):.2e}  {speed:,.0f} tokens/s",
                    flush=True,
                )
                if any(math.isinf(x) or (math.isnan(x) and c) for x, c in zip(mean, counts, strict=True)):
                    raise SystemExit("the loss is not a number any more: lower the learning rate")
            if out and time.monotonic() - saved > every * 60:
                self.state.sums = sums.tolist()
                self.save(out)
                saved = time.monotonic()
        self.state.sums = sums.tolist()
        if out:
            self.save(out)
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        return self.state.step >= self.settings.steps

    # --- checkpoints: three files, whole or not there ---------------------------------------------

    def save(self, out: Path) -> Path:
        """Write `out/step-N`; the one before it stays, older ones go."""
        folder = out / f"step-{self.state.step:07d}"
        if folder.exists():
            return folder
        part = out / f".part-{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        named = dict(self.model.named_parameters())
        save_file({name: p.detach().cpu().contiguous() for name, p in named.items()}, part / "model.safetensors")
        moments = {
            f"{key}/{name}": value.detach().cpu().contiguous()
            for name, p in named.items()
            for optimiser in self.optimisers
            for key, value in optimiser.state.get(p, {}).items()
        }
        save_file(moments, part / "optimiser.safetensors")
        device = (
            torch.cuda.get_device_name() if self.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        about = {"settings": asdict(self.settings), "state": asdict(self.state), "device": device}
        (part / "state.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        part.rename(folder)
        for old in sorted(out.glob("step-*"))[:-2]:
            shutil.rmtree(old)
        print(f"saved {folder}", flush=True)
        return folder

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        named = dict(self.model.named_parameters())
        weights, moments = load_file(folder / "model.safetensors"), load_file(folder / "optimiser.safetensors")
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(weights[name])
        about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.state = State(**{**about["state"], "at": tuple(about["state"]["at"])})
        if self.state.optimisers[-1][1] != self.settings.optimiser:
            self.state.optimisers.append((self.state.step, self.settings.optimiser))
        if self.state.step:
            for optimiser in self.optimisers:
                muon = isinstance(optimiser, torch.optim.Muon)
                keys = ("momentum_buffer",) if muon else ("step", "exp_avg", "exp_avg_sq")
                for p in (p for group in optimiser.param_groups for p in group["params"]):
                    name = next(name for name, other in named.items() if other is p)
                    kept = {key: moments.get(f"{key}/{name}") for key in keys}
                    # Another optimiser than the checkpoint's starts anew.
                    optimiser.state[p] = {key: t.to(self.device) for key, t in kept.items() if t is not None}


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def last(out: Path) -> Path | None:
    """The newest checkpoint of a run."""
    return max(out.glob("step-*"), default=None)


def settings_of(folder: Path) -> Settings:
    """The settings of a checkpoint."""
    found = json.loads((folder / "state.json").read_text(encoding="utf-8"))["settings"]
    return Settings(**{**found, "betas": tuple(found["betas"])})


# --- probing --------------------------------------------------------------------------------------


def probe(settings: Settings, cache: Cache, device: str, seconds: float, special: dict[str, int]) -> None:
    """Try settings for a while each: first for speed, then learning rates at the fastest."""
    gpu = device == "cuda"
    tries = [
        replace(settings, rows=rows, accumulate=1, compile=compiled, attention=attention, precision=precision)
        for rows in ((32, 64, 128) if gpu else (4, 8, 16))
        for attention in (("flex", "sdpa") if gpu else ("sdpa",))
        for compiled in ((True,) if gpu or rows != 8 else (False, True))
        for precision in (("bf16",) if gpu or rows != 8 else ("bf16", "fp32"))
    ]
    best, fastest = settings, 0.0
    print("  rows  attention  compile  precision  lr        tokens/s   text  answers")
    for one in tries:
        speed = _try(one, cache, device, seconds, special)
        if speed > fastest:
            best, fastest = one, speed
    for lr in (5e-4, 1e-3, 2e-3, 4e-3):
        _try(replace(best, lr=lr, warmup=20), cache, device, seconds, special)
    print(f"fastest: {fastest:,.0f} tokens/s; in three hours {fastest * 3 * 3600:.2g} tokens")


def _try(s: Settings, cache: Cache, device: str, seconds: float, special: dict[str, int]) -> float:
    """Tokens per second after the first two steps, which compile and warm up; a line with it and the last losses."""
    line = f"{s.rows:>6}  {s.attention:<9}  {s.compile!s:<7}  {s.precision:<9}  {s.lr:<8.1e}"
    try:
        trainer = Trainer(replace(s, tokens=1e12), cache, device=device, **special)
        begin, tokens, sums = time.monotonic(), 0, []
        for micro in trainer.batches():
            sums.append(torch.stack(trainer.step(micro)))
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            if trainer.state.step == 2:
                begin, tokens = time.monotonic(), trainer.state.tokens
            # A step may take longer than the time there is: two are for warming up, one is measured.
            if trainer.state.step > 2 and time.monotonic() - begin > seconds:
                break
    except Exception as error:  # too large for the memory, or no compiler here: the next try may work
        print(f"{line}  {type(error).__name__}: {str(error).splitlines()[0][:80]}", flush=True)
        return 0.0
    speed = (trainer.state.tokens - tokens) / (time.monotonic() - begin)
    nats, counts = torch.stack(sums[-max(1, len(sums) // 5) :]).sum(0).tolist()
    print(f"{line}{speed:>10,.0f}  {nats[TEXT] / counts[TEXT]:5.2f}  {nats[ANSWER] / counts[ANSWER]:7.2f}", flush=True)
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    parser.add_argument("--cache", type=Path, default=Path("bases/cache"))
    parser.add_argument("--out", type=Path, help="default: bases/runs/SIZE")
    parser.add_argument("--tokens", type=float, help="to see in all; default 2e9")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, save and be resumed later")
    parser.add_argument("--every", type=float, default=5, help="minutes between checkpoints")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of --out, if there is one"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int)
    parser.add_argument("--rows", type=int, help="of a micro-batch")
    parser.add_argument("--accumulate", type=int, help="micro-batches of a step")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--warmup", type=int, help="steps")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--optimiser", choices=("muon", "adamw"), help="of the blocks' matrices; default: muon")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where the processor has it")
    parser.add_argument("--attention", choices=("sdpa", "flex"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU")
    parser.add_argument("--report", type=int, default=50, help="steps between lines")
    parser.add_argument("--probe", action="store_true", help="try settings, train nothing")
    parser.add_argument("--seconds", type=float, default=60, help="of each try of --probe")
    args = parser.parse_args()

    device, out = args.device, args.out or Path("bases/runs") / args.size
    given = {f.name: getattr(args, f.name, None) for f in fields(Settings) if f.name != "size"}
    asked = {name: value for name, value in given.items() if value is not None}
    settings = Settings(
        size=args.size,
        length=LENGTH[device],
        rows=ROWS[device],
        accumulate=ACCUMULATE[device],
        precision="bf16" if has_bf16(torch.device(device)) else "fp32",
        compile=device == "cuda",
    )
    found = last(out) if args.resume else None
    if found:
        # Only what leaves the data order and the curve so far as they are may change.
        changed = {k: v for k, v in asked.items() if k in ("tokens", "compile", "attention", "optimiser")}
        if refused := sorted(set(asked) - set(changed)):
            parser.error(f"a resumed run keeps its {', '.join(refused)}")
        settings = replace(settings_of(found), **changed)
    elif out.exists() and last(out) and not args.probe:
        parser.error(f"{out} has a run: --resume it, or give another --out")
    else:
        settings = replace(settings, **asked)

    cache = Cache.open(args.cache)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.cache / "tokenizer")
    special = {"vocabulary": len(tokenizer), "pad": tokenizer.pad_token_id, "end": tokenizer.eos_token_id}
    if args.probe:
        probe(settings, cache, device, args.seconds, special)
        return
    trainer = Trainer(settings, cache, device=device, **special)
    if found:
        trainer.load(found)
    size = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{size / 1e6:.1f} M parameters, {settings.steps} steps of {settings.step_tokens} tokens, {device}", flush=True
    )
    done = trainer.run(minutes=args.minutes, report=args.report, out=out, every=args.every)
    print("done" if done else "to be resumed")
    sys.exit(0)


if __name__ == "__main__":
    main()
