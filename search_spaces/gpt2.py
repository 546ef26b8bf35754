"""Search spaces for fine-tuning GPT-2.

The GPT-2 report fine-tunes nothing, so the ranges surround what its predecessor and its users chose:

- GPT-1 (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 4.1): learning rate
  6.25e-5, batch size 32, weight decay 0.01, linear decay after a warmup over 0.2 % of training.
- ColossalAI's GLUE example for GPT-2 (examples/language/gpt/hybridparallelism/finetune.py): learning rate 2.4e-5 and
  batch size 32 for each rank, weight decay 0.01, warmup over 10 % of training.
"""

from __future__ import annotations

from search_spaces.domains import Choice, LogUniform, SearchSpace, Uniform


def gpt2() -> SearchSpace:
    """GPT-2 small, 124M parameters."""
    return SearchSpace(
        domains={
            "learning_rate": LogUniform(1e-5, 2e-4),  # 2.4e-5 and 6.25e-5, with room to either side
            "batch_size": Choice((16, 32, 64)),  # 32, its half and its double
            "weight_decay": Uniform(0.0, 0.1),  # 0.01; RoBERTa's fine-tuning takes 0.1
            "warmup_fraction": Uniform(0.0, 0.1),  # 0.2 % to 10 %
        },
        defaults={"learning_rate": 6.25e-5, "batch_size": 32, "weight_decay": 0.01, "warmup_fraction": 0.002},
    )


def gpt2_medium() -> SearchSpace:
    """GPT-2 medium, 355M parameters, and larger: as `gpt2`, with the upper end of the learning rate lowered.

    No paper gives this range. GPT-3 (Brown et al. 2020, table 2.1) halves the learning rate from its 125M to its 350M
    model, in pre-training.
    """
    return gpt2() | {"learning_rate": LogUniform(5e-6, 1e-4)}
