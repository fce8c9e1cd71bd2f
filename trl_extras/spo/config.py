"""Configuration of Stable Preference Optimization."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, fields

from trl import DPOConfig

from ..errors import ConfigurationError
from ..rounds.config import set_number


SOLVERS = ("penalty", "unrolled", "alternating")
HINGES = ("example", "batch")
LOWER_LEVELS = ("chosen", "sft_dataset", "both")
HYPERGRADIENTS = ("first_order", "central_difference")
REFERENCE = "reference"
# Upper-level losses that are ours, each with the field that belongs to it.
OWN_LOSSES = {"simpo": "simpo_gamma", "dpop": "dpop_lambda"}
# Losses in which no reference occurs.
REFERENCE_FREE = {"simpo", "sft"}
# Optimisers that step during the backward pass.
_IN_BACKWARD = ("lomo", "adalomo")


@dataclass
class SPOConfig(DPOConfig):
    r"""
    Configuration of the [`SPOTrainer`]: Stable Preference Optimization (arXiv 2507.07723), a preference loss over a
    floor for the likelihood of what the model shall keep. The fields of [`~trl.DPOConfig`], whose `loss_type` also
    takes `"simpo"` and `"dpop"` here, and:

    Parameters:
        bilevel_solver (`str`, *optional*, defaults to `"penalty"`):
            Where the gradient of the objective is taken: `"penalty"`, at the weights (the paper's second version);
            `"unrolled"`, after `inner_steps` steps of supervised fine-tuning, which are taken back (its first
            version, as we read it); `"alternating"`, after them, and they are kept.
        sft_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the gap (the paper's lambda). 0 with `"penalty"` is DPO, with the metrics of this method.
        sft_tolerance (`float`, *optional*, defaults to `0.0`):
            Nats per token that the likelihood may fall below the floor (epsilon).
        sft_optimum (`str`, *optional*, defaults to `"reference"`):
            The floor: `"reference"`, what the reference gives each response, or a number, nats per token. 0 turns the
            gap into supervised fine-tuning, which never stops pulling.
        hinge (`str`, *optional*, defaults to `"example"`):
            Whether each example has a floor of its own, or the mean over the tokens of the whole `"batch"` has one.
        lower_level (`str`, *optional*):
            What is kept: the `"chosen"` responses, the rows of an `"sft_dataset"`, or `"both"`. By default both where
            there is an SFT dataset, else the chosen responses.
        sft_dataset_name, sft_dataset_config, sft_dataset_split (`str`, *optional*):
            The SFT dataset, as `datasets.load_dataset` takes it (split `"train"` by default), in any format that
            [`~trl.SFTTrainer`] takes. An `sft_dataset` given to the trainer wins.
        sft_batch_size (`int`, *optional*):
            SFT rows for each micro-batch of pairs, per process; `per_device_train_batch_size` by default.
        inner_learning_rate (`float`, *optional*):
            Step size of the inner steps; `learning_rate` by default, whatever the schedule.
        inner_steps (`int`, *optional*, defaults to `1`):
            Inner steps before each step of the optimizer.
        hypergradient (`str`, *optional*, defaults to `"first_order"`):
            With `"unrolled"`: whether the inner step's own derivative is left out, or taken from two more gradients
            (`"central_difference"`, for one inner step).
        simpo_gamma (`float`, *optional*, defaults to `0.5`):
            Target margin of `loss_type="simpo"`.
        dpop_lambda (`float`, *optional*, defaults to `50.0`):
            Weight of the positive term of `loss_type="dpop"` (that paper's lambda).
    """

    bilevel_solver: str = field(
        default="penalty",
        metadata={
            "help": "Where the objective's gradient is taken: 'penalty', at the weights; 'unrolled', after inner "
            "steps that are taken back; 'alternating', after inner steps that are kept.",
            "choices": list(SOLVERS),
        },
    )
    sft_coef: float = field(default=1.0, metadata={"help": "Weight of the gap (lambda). 0 with 'penalty' is DPO."})
    sft_tolerance: float = field(
        default=0.0, metadata={"help": "Nats per token that the likelihood may fall below the floor (epsilon)."}
    )
    sft_optimum: str = field(
        default=REFERENCE,
        metadata={"help": "The floor: 'reference', the reference's likelihood, or a number in nats per token."},
    )
    hinge: str = field(
        default="example",
        metadata={
            "help": "'example': a floor for each example. 'batch': one for the token mean of the whole batch.",
            "choices": list(HINGES),
        },
    )
    lower_level: str | None = field(
        default=None,
        metadata={
            "help": "What is kept: 'chosen' responses, 'sft_dataset' rows, or 'both'. By default both where there is "
            "an SFT dataset, else the chosen responses.",
            "choices": list(LOWER_LEVELS),
        },
    )
    sft_dataset_name: str | None = field(default=None, metadata={"help": "Dataset of supervised rows to keep."})
    sft_dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the SFT dataset."})
    sft_dataset_split: str | None = field(
        default=None, metadata={"help": "Split of the SFT dataset; 'train' by default."}
    )
    sft_batch_size: int | None = field(
        default=None,
        metadata={"help": "SFT rows for each micro-batch of pairs, per process; the pair batch size by default."},
    )
    inner_learning_rate: float | None = field(
        default=None, metadata={"help": "Step size of the inner steps; the learning rate by default."}
    )
    inner_steps: int = field(default=1, metadata={"help": "Inner steps before each step of the optimizer."})
    hypergradient: str = field(
        default="first_order",
        metadata={
            "help": "With 'unrolled': leave out the inner step's derivative, or take it from a central difference.",
            "choices": list(HYPERGRADIENTS),
        },
    )
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target margin of loss_type 'simpo'."})
    # Pal et al. 2024, arXiv 2402.13228: 50 in their experiments.
    dpop_lambda: float = field(default=50.0, metadata={"help": "Weight of the positive term of loss_type 'dpop'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate_spo()

    def validate_spo(self) -> None:
        """
        Check the fields of this class, and that the rest of the configuration works with them; the trainer does it
        again, because fields can be set after the config was made.

        Raises:
            ValueError: naming the field, what it got, what it wants.
        """
        for name, choices in (
            ("bilevel_solver", SOLVERS), ("hinge", HINGES), ("hypergradient", HYPERGRADIENTS),
            ("lower_level", (None, *LOWER_LEVELS)),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                wanted = ", ".join(repr(choice) for choice in choices if choice is not None)
                raise ConfigurationError(f"`{name}` is {getattr(self, name)!r}, but wants one of {wanted}.")
        for name, meaning in (
            ("sft_coef", "the weight of the gap"),
            ("sft_tolerance", "nats per token"),
            ("inner_learning_rate", "or nothing for the learning rate"),
            ("dpop_lambda", "50 in its paper"),
        ):
            if getattr(self, name) is not None:
                set_number(self, name, lambda value: value >= 0, f"a finite number of at least 0, {meaning}")
        set_number(self, "simpo_gamma", lambda value: True, "a finite number")
        if self.sft_optimum != REFERENCE:
            wants = f"{REFERENCE!r} or a finite number of at least 0, in nats per token"
            set_number(self, "sft_optimum", lambda value: value >= 0, wants)
            # As text, like everything that may be a word or a number.
            self.sft_optimum = repr(float(self.sft_optimum))
        for name in ("inner_steps", "sft_batch_size"):
            value = getattr(self, name)
            if name == "sft_batch_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"`{name}` is {value!r}, but wants a whole number of at least 1.")
        self._check_data()
        self._check_solver()
        self._check_losses()

    def _is_set(self, name: str) -> bool:
        """Whether a field has another value than its default."""
        return getattr(self, name) != next(f.default for f in fields(self) if f.name == name)

    def _check_data(self) -> None:
        if self.sft_dataset_name is None:
            for name in ("sft_dataset_config", "sft_dataset_split"):
                if getattr(self, name) is not None:
                    raise ConfigurationError(
                        f"`{name}` is {getattr(self, name)!r}, but there is no `sft_dataset_name` for it: give that, "
                        "or leave it out."
                    )
        elif self.lower_level == "chosen":
            raise ConfigurationError(
                "`sft_dataset_name` is set, but `lower_level='chosen'` uses no SFT dataset: leave one out, or use "
                "`lower_level='both'`."
            )

    def _check_solver(self) -> None:
        if self.bilevel_solver == "penalty":
            for name in ("inner_learning_rate", "inner_steps"):
                if self._is_set(name):
                    raise ConfigurationError(
                        f"`{name}` is {getattr(self, name)!r}, but `bilevel_solver='penalty'` takes no inner steps: "
                        "leave it out, or use 'unrolled' or 'alternating'."
                    )
        if self.hypergradient != "first_order" and self.bilevel_solver != "unrolled":
            raise ConfigurationError(
                f"`hypergradient` is {self.hypergradient!r}, but belongs to `bilevel_solver='unrolled'`, and that is "
                f"{self.bilevel_solver!r}: leave it out, or use 'unrolled'."
            )
        if self.hypergradient == "central_difference" and self.inner_steps != 1:
            raise ConfigurationError(
                f"`inner_steps` is {self.inner_steps}, but `hypergradient='central_difference'` is the derivative of "
                "one inner step: use `inner_steps=1`, or 'first_order'."
            )

        if self.bilevel_solver == "penalty":
            return
        # Where an inner step would be wrong or lost.
        if self.fp16:
            raise ConfigurationError(
                f"`fp16=True` scales losses, and inner steps (`bilevel_solver={self.bilevel_solver!r}`) take "
                "gradients that no scaler sees: use `bf16=True` or float32, or 'penalty'."
            )
        optimizer = str(getattr(self.optim, "value", self.optim))
        if optimizer in _IN_BACKWARD or optimizer.endswith("_layerwise"):
            raise ConfigurationError(
                f"`optim='{optimizer}'` changes weights during the backward pass, where inner steps "
                f"(`bilevel_solver={self.bilevel_solver!r}`) still have to be taken back: use another one, or "
                "'penalty'."
            )
        if self.bilevel_solver == "alternating" and getattr(self, "enable_jit_checkpoint", False):
            raise ConfigurationError(
                "`enable_jit_checkpoint=True` may save between an inner step that is kept and the step that belongs "
                "to it: leave it out, or use 'unrolled' or 'penalty'."
            )
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigurationError(
                "`gradient_checkpointing_kwargs={'use_reentrant': True}` does not let gradients be taken for inner "
                f"steps (`bilevel_solver={self.bilevel_solver!r}`): leave it at False."
            )

    def _check_losses(self) -> None:
        known = {*re.findall(r"`'(\w+)'`", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]), *OWN_LOSSES}
        for name in self.loss_type:
            close = difflib.get_close_matches(name.lower(), known, n=1)
            # A newer TRL may have losses that its help text does not name: only what looks like a slip is refused.
            if name not in known and close:
                raise ConfigurationError(f"`loss_type` has {name!r}, which is not known: did you mean {close[0]!r}?")
        for loss, option in OWN_LOSSES.items():
            if loss not in self.loss_type and self._is_set(option):
                raise ConfigurationError(
                    f"`{option}` is {getattr(self, option)!r}, but belongs to `loss_type='{loss}'`, and that is "
                    f"{self.loss_type}: leave it out, or add {loss!r}."
                )
        own = [name for name in self.loss_type if name in OWN_LOSSES]
        if own:
            for name, reason in (
                ("use_weighting", "its weights belong to TRL's own losses"),
                ("f_divergence_type", "it is no function of that divergence"),
            ):
                if self._is_set(name):
                    raise ConfigurationError(
                        f"`{name}` is {getattr(self, name)!r}, but does not work with `loss_type='{own[0]}'`: "
                        f"{reason}."
                    )
            if self.label_smoothing and len(own) == len(self.loss_type):
                raise ConfigurationError(
                    f"`label_smoothing` is {self.label_smoothing!r}, but `loss_type={self.loss_type}` does not use "
                    "it: leave it out."
                )
        if self.ld_alpha is not None:
            raise ConfigurationError(
                f"`ld_alpha` is {self.ld_alpha!r}, but makes log-probabilities that are no likelihoods, and the floor "
                "is one of likelihood: leave it out."
            )
        if self.sync_ref_model:
            raise ConfigurationError(
                "`sync_ref_model=True` moves the reference after the policy, and the floor with it: leave it out."
            )

    @property
    def is_reference_free(self) -> bool:
        """Whether no reference occurs in the upper-level loss."""
        return set(self.loss_type) <= REFERENCE_FREE

    @property
    def optimum(self) -> float | None:
        """The floor in nats per token, or None for the reference's."""
        return None if self.sft_optimum == REFERENCE else float(self.sft_optimum)

    @property
    def inner_rate(self) -> float:
        """Step size of the inner steps."""
        return float(self.learning_rate if self.inner_learning_rate is None else self.inner_learning_rate)
