"""Accelerated Preference Optimization (APO) from the command line: a dataset of preferences, or of prompts with
something that judges, a model, and rounds of DPO.

```bash
trl-extras apo --config recipe.yaml
accelerate launch trl_extras/scripts/apo.py \\
    --model_name_or_path Qwen/Qwen2-0.5B-Instruct \\
    --dataset_name trl-lib/ultrafeedback_binarized \\
    --num_rounds 3 \\
    --extrapolation_alpha 0.3 \\
    --output_dir Qwen2-0.5B-APO
```

Flags and YAML keys are those of TRL's `dpo` script plus the fields of [`APOConfig`]; unknown and shortened ones are
refused.
"""

from __future__ import annotations

from trl_extras.scripts._training import TrainingScript


script = TrainingScript(
    "apo", "Accelerated Preference Optimization (APO, arXiv 2410.06293): rounds of DPO, with momentum between rounds."
)
PROG = script.prog
make_parser, parse_arguments, main = script.make_parser, script.parse_arguments, script.main

if __name__ == "__main__":
    script.run()
