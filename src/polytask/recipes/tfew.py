"""T-Few: one recipe for every task of a few examples whose answer is one of several options.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel 2022, arXiv 2205.05638. (IA)³ is trained with losses over right and
wrong options (`polytask.training.tfew`), the option of the greatest likelihood per token is the answer, and nothing is
tuned: 1000 steps of 8 examples, a rate of 3e-3 that rises over 60 steps and falls to zero in a straight line, gradients
clipped at 1, no weight decay.

What differs from the paper:
- AdamW instead of Adafactor, at the same rate. Adafactor's is relative to the size of what it moves, and vectors at 1
  have size 1; the rate belongs to these vectors and so does not fall with the model's width.
- Steps are cut into epochs. A task that has validation examples is scored after each by the probabilities of its right
  answers' tokens, like every answer in text: that costs one sequence an example where a choice costs one an option, and
  accuracy on a few examples takes few values, so that the first lucky epoch would stay. The best epoch is kept, and
  training never stops early. Without validation examples the last step is kept, as in the paper.
- One template instead of one drawn for each example, and prompts of up to 512 tokens instead of 256, since ours list
  the labels.
- The paper's model, T0, and its vectors had been trained on many tasks before. Here that is another adapter of (IA)³ to
  begin with.
- As the authors did for a task of 77 labels, one of more than 24 is to be trained without the losses over wrong ones;
  it is refused here.
"""

from __future__ import annotations

from typing import Any

from polytask.recipes.reading import Reading
from polytask.training import Settings

METHOD = "ia3"
READING = Reading(in_text="yes", decide="likelihood", objective="tfew")
STEPS, BATCH = 1000, 8


def settings(examples: int, **given: Any) -> Settings:
    """How a task with so many training examples is trained; what is given counts more."""
    batch = max(1, given.get("batch", BATCH))
    epochs = given.get("epochs", max(1, round(STEPS / -(-max(1, examples) // batch))))
    own = {"lr": 3e-3, "epochs": epochs, "batch": BATCH, "warmup": 0.06, "weight_decay": 0.0, "patience": epochs}
    return Settings(**(own | given))
