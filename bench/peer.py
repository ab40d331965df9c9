"""What a user would pick instead: PEFT on the same weights, trained by the Hugging Face Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from bench.measure import Window
from polytask.backbones.loading import embedded_folder

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def lora_model(labels: int, *, r: int = 8, alpha: int = 16, seed: int = 0) -> torch.nn.Module:
    """The embedded MiniLM with a new classifier and LoRA on query and value, as PEFT's guides do it."""
    transformers.set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(embedded_folder(), num_labels=labels)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=r, lora_alpha=alpha, target_modules=["query", "value"])
    return get_peft_model(model, config)


def rows(texts: Sequence[str], labels: Sequence[int], *, pad_to: int | None, limit: int = 256) -> list[dict[str, Any]]:
    """Tokenised examples: padded to `pad_to` tokens beforehand, or left to the collator."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    padding: Any = "max_length" if pad_to else False
    encoded = tokenizer(list(texts), truncation=True, max_length=pad_to or limit, padding=padding)
    names = list(encoded.keys())
    return [{n: encoded[n][i] for n in names} | {"labels": y} for i, y in enumerate(labels)]


class _Clock(TrainerCallback):
    """Counts from the first step to the last; set-up and tear-down of the Trainer do not count."""

    def __init__(self, window: Window) -> None:
        self.window = window

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.window.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            self.window.stop()


def trainer(
    model: torch.nn.Module,
    data: list[dict[str, Any]],
    *,
    bf16: bool = False,
    epochs: float = 1,
    batch: int = 32,
    lr: float = 5e-5,
    seed: int = 0,
    window: Window | None = None,
) -> Trainer:
    """A Trainer with its defaults but for what would write to disk or screen. Its collator pads each batch."""
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=batch,
        num_train_epochs=epochs,
        learning_rate=lr,
        bf16=bf16,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        seed=seed,
    )
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    callbacks: list[TrainerCallback] = [_Clock(window)] if window else []
    return Trainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)
