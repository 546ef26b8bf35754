"""Search space for fine-tuning all weights of Llama-class decoders (1B to 13B parameters).

- Llama 2 (Touvron et al. 2023, section 3.1): supervised fine-tuning with a cosine schedule from 2e-5, weight decay 0.1,
  batch size 64.
- Stanford Alpaca (2023, its README): 2e-5 for 7B and 1e-5 for 13B, batch size 128, no weight decay, warmup over 3 % of
  training, cosine schedule.

Adapters (LoRA, QLoRA) want a learning rate about ten times as high; they are not what `finetune` trains.
"""

from __future__ import annotations

from search_spaces.domains import Choice, LogUniform, SearchSpace, Uniform


def llama() -> SearchSpace:
    """Llama and other decoders of its kind: Mistral, Qwen."""
    return SearchSpace(
        domains={
            "learning_rate": LogUniform(5e-6, 5e-5),  # 1e-5 and 2e-5, with room to either side
            "batch_size": Choice((32, 64, 128)),  # 64 and 128; 32 for the smaller sets of a classification
            "weight_decay": Uniform(0.0, 0.1),  # 0 (Alpaca) to 0.1 (Llama 2)
            "warmup_fraction": Uniform(0.0, 0.1),  # 3 % (Alpaca)
            "schedule": Choice(("cosine", "linear")),  # cosine in both; linear is what GLUE results were made with
        },
        defaults={
            "learning_rate": 2e-5,
            "batch_size": 64,
            "weight_decay": 0.1,
            "warmup_fraction": 0.03,
            "schedule": "cosine",
        },
    )
