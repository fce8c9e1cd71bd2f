"""Successive Policy Re-weighting (SPR) from the command line: prompts or responses, something that scores, a model,
and rounds of weighted fine-tuning.

```bash
trl-extras spr --config recipe.yaml
accelerate launch trl_extras/scripts/spr.py \\
    --model_name_or_path Qwen/Qwen2-0.5B-Instruct \\
    --dataset_name trl-lib/ultrafeedback-prompt \\
    --reward_funcs my_rewards:score \\
    --num_rounds 3 \\
    --reward_temperature 0.2 \\
    --output_dir Qwen2-0.5B-SPR
```

Flags and YAML keys are those of TRL's `sft` script plus the fields of [`SPRConfig`]; unknown and shortened ones are
refused.
"""

from __future__ import annotations

from trl_extras.scripts._training import TrainingScript


script = TrainingScript(
    "spr",
    "Successive Policy Re-weighting (SPR, ICLR 2025 submission 12963): rounds of fine-tuning on responses weighted by "
    "their rewards.",
)
PROG = script.prog
make_parser, parse_arguments, main = script.make_parser, script.parse_arguments, script.main

if __name__ == "__main__":
    script.run()
