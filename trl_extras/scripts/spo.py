"""Stable Preference Optimization (SPO) from the command line: a dataset of preferences, a model, DPO above a floor for
the likelihood of what the model shall keep, and, if there is one, a dataset of supervised rows to keep.

```bash
trl-extras spo --config recipe.yaml
accelerate launch trl_extras/scripts/spo.py \\
    --model_name_or_path Qwen/Qwen2-0.5B-Instruct \\
    --dataset_name trl-lib/ultrafeedback_binarized \\
    --sft_dataset_name trl-lib/Capybara \\
    --sft_coef 1.0 \\
    --output_dir Qwen2-0.5B-SPO
```

Flags and YAML keys are those of TRL's `dpo` script plus the fields of [`SPOConfig`]; unknown and shortened ones are
refused.
"""

from __future__ import annotations

from trl_extras.scripts._training import TrainingScript


script = TrainingScript(
    "spo",
    "Stable Preference Optimization (SPO, arXiv 2507.07723): DPO above a floor for the likelihood of what the model "
    "shall keep.",
)
PROG = script.prog
make_parser, parse_arguments, main = script.make_parser, script.parse_arguments, script.main

if __name__ == "__main__":
    script.run()
