"""
*Accelerated* preference optimization (arXiv 2410.06293) over the objective of Stable Preference Optimization (arXiv
2507.07723): the combination is ours.

In round t the floor of the chosen responses is what the round's reference theta_t gives them; the floor of the SFT
dataset stays what the initial model gave it, so that it cannot sink from round to round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..apo.trainer import APOTrainer
from ..spo.trainer import SPOTrainer
from .config import APOSPOConfig


class APOSPOTrainer(APOTrainer, SPOTrainer):
    """
    Trainer for *accelerated* preference optimization in rounds, each with the objective of Stable Preference
    Optimization. Takes the arguments of [`APOTrainer`] and [`SPOTrainer`]; `args` is an [`APOSPOConfig`].
    """

    config_class = APOSPOConfig
    _tag_names = ["trl", "dpo", "accelerated-preference-optimization", "stable-preference-optimization"]  # noqa: RUF012
    _name = "APO-SPO"
    _paper = {  # noqa: RUF012
        **APOTrainer._paper,
        "citation": f"{APOTrainer._paper['citation']}\n\n{SPOTrainer._paper['citation']}",
    }

    def _begin(self, checkpoint: Path | None) -> None:
        super()._begin(checkpoint)
        if self._makes_rows and "chosen" in self._spo_sources and self.args.sft_coef > 0:
            # docs/acceleration.md, "With a floor".
            self._say(
                "Chosen responses that the policy has sampled have a floor too, which did more harm than good where "
                "it was measured: `lower_level='sft_dataset'` leaves the floor to the SFT dataset."
            )

    def _release_reference(self) -> None:
        """Later rounds' references are computed with it where the user passed one."""

    def _comparable_configuration(self, config: Any) -> dict[str, Any]:
        fields = super()._comparable_configuration(config)
        # Its rows are compared, and the name may be a folder of this machine.
        fields.pop("sft_dataset_name", None)
        return fields
