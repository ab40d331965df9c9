"""Adapters to and from the folder format of Hugging Face PEFT, which vLLM and others serve.

| polytask                          | PEFT                                                                        |
|-----------------------------------|-----------------------------------------------------------------------------|
| LoRA `<site>/A` [r, in]           | `base_model.model.<path>.lora_A.weight` [r, in]                             |
| LoRA `<site>/B` [out, r]          | `base_model.model.<path>.lora_B.weight` [out, r]                            |
| alpha / r, or alpha / √r (rslora) | `lora_alpha`, `r`, `use_rslora`, and by module `alpha_pattern`, `rank_pattern` |
| DoRA `<site>/m` [out]             | `base_model.model.<path>.lora_magnitude_vector` [out]                       |
| (IA)^3 `<site>/l` at an output    | `<path>.ia3_l` [out, 1]                                                     |
| (IA)^3 `<site>/l` at an input     | `<path>.ia3_l` [1, in], the path also in `feedforward_modules`              |
| PiSSA, KaSA                       | a LoRA of twice the rank: see `inplace`                                     |
| prompt, ptuning, prefix           | `prompt_embeddings`: see `tokens`                                           |
| head, `task/mean`, card           | `polytask_head.safetensors`, `polytask_head.json`: PEFT does not read them  |

A site that is a part of a fused projection (GPT-2's q of `c_attn`) has no module of its own. The parts p of one module
become one block,

    A = [A_1; A_2; …],  B[rows_p, columns_p] = B_p,  alpha = scale · Σ r_p,

which computes the same; parts that share one A keep its rank.
"""

from polytask.adapters.peft.layout import ModelLike, SiteLike, is_peft
from polytask.adapters.peft.read import import_peft
from polytask.adapters.peft.write import export_peft

__all__ = ["ModelLike", "SiteLike", "export_peft", "import_peft", "is_peft"]
