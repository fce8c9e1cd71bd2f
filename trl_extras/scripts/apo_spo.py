"""Accelerated Preference Optimization over Stable Preference Optimization (APO x SPO) from the command line: rounds
with momentum, each of which trains above a floor for the likelihood of what the model shall keep.

```bash
trl-extras apo_spo --config recipe.yaml
accelerate launch trl_extras/scripts/apo_spo.py \\
    --model_name_or_path Qwen/Qwen2-0.5B-Instruct \\
    --dataset_name trl-lib/ultrafeedback-prompt \\
    --reward_funcs trl-lib/Qwen2-0.5B-Reward \\
    --sft_dataset_name trl-lib/Capybara \\
    --num_rounds 3 \\
    --output_dir Qwen2-0.5B-APO-SPO
```

Flags and YAML keys are those of TRL's `dpo` script plus the fields of [`APOSPOConfig`]; unknown and shortened ones
are refused.
"""

from __future__ import annotations

from trl_extras.scripts._training import TrainingScript


script = TrainingScript(
    "apo_spo",
    "Accelerated Preference Optimization over Stable Preference Optimization (APO x SPO): rounds with momentum, each "
    "above a floor for the likelihood of what the model shall keep.",
)
PROG = script.prog
make_parser, parse_arguments, main = script.make_parser, script.parse_arguments, script.main

if __name__ == "__main__":
    script.run()
