"""What one trial is told: plain, checked settings. The spec file's sections are these classes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt


def _yaml_word(value: object) -> object:
    """In YAML 1.1 a bare `on` is a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Settings(BaseModel):
    """Base of every section: unknown keys are refused, values are not changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Settings):
    name: str = Field(min_length=1)
    """Hub name or local folder."""
    from_scratch: bool = False
    """True: random weights from the config and the tokenizer of `name`."""
    config: dict[str, Any] = {}
    """Overrides of the model's config (n_layer, resid_pdrop, ...)."""


class DataConfig(Settings):
    task: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"] | None = None
    """A GLUE task: its columns, labels and metrics. Without `path` it comes from the hub."""
    path: str | None = None
    """A folder that holds train and validation as parquet, csv or jsonl."""
    text: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] | None = None
    """One or two text columns; only for a path without a task."""
    label: str = "label"
    """The label column: integers or strings, mapped in sorted order. In csv files integers where all look so."""


class TrainingConfig(Settings):
    max_epochs: PositiveInt = 9
    """Of a trial that nobody stops."""
    batch_size: PositiveInt = 32
    """Rows of one optimizer step, over all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Rows of one forward pass on one rank; null: no accumulation."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Tokens of one row, special tokens included; longer rows are cut."""
    learning_rate: PositiveFloat = 2.4e-5
    """Peak of the schedule. Never scaled by the number of ranks."""
    weight_decay: NonNegativeFloat = 0.01
    """On matrices only: no biases, no norms."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of all steps in which the learning rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Of the learning rate, after the warm-up; the first two end at 0."""
    max_grad_norm: PositiveFloat | None = 1.0
    """null: no clipping."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast; weights and optimizer state stay fp32."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Of new weights, the order of rows and dropout; the same for all trials."""
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_yaml_word)] = "auto"
    """How steps are made ready on a GPU. off: not at all. auto: as CUDA graphs of torch's own kernels, which costs a
    second. on: as CUDA graphs of kernels compiled for the model, which costs 20 s for every new model and dropout.
    auto does that too where one trial is so long that it pays. On a CPU auto is off."""


class FinetuneConfig(Settings):
    """Everything that `finetune` needs to know of one trial: the spec's sections with the sampled values in."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig

    def with_params(self, params: dict[str, Any]) -> FinetuneConfig:
        """These settings with sampled values put in: fields of `training`, or `model.config.KEY`."""
        prefix = "model.config."
        overrides = {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}
        fields = {name: value for name, value in params.items() if not name.startswith(prefix)}
        return FinetuneConfig(
            model=ModelConfig(**self.model.model_dump() | {"config": self.model.config | overrides}),
            data=self.data,
            training=TrainingConfig(**self.training.model_dump() | fields),
        )
