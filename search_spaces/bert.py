"""Search spaces for fine-tuning encoders of the BERT family.

- BERT (Devlin et al. 2019, appendix A.3): batch size 16 or 32, learning rate 5e-5, 3e-5 or 2e-5, 2 to 4 epochs, dropout
  kept at 0.1; appendix A.2: weight decay 0.01 in pre-training.
- RoBERTa (Liu et al. 2019, table 10): on GLUE batch size 16 or 32, learning rate 1e-5, 2e-5 or 3e-5, weight decay 0.1,
  warmup over 6 % of training, linear decay.
"""

from __future__ import annotations

from search_spaces.domains import Choice, LogUniform, SearchSpace, Uniform


def bert() -> SearchSpace:
    """BERT base, RoBERTa base and other encoders of about 100M parameters."""
    return SearchSpace(
        domains={
            "learning_rate": LogUniform(1e-5, 1e-4),  # the 1e-5 to 5e-5 of both papers, with room above
            "batch_size": Choice((16, 32)),  # both papers
            "weight_decay": Uniform(0.0, 0.1),  # 0.01 (BERT) to 0.1 (RoBERTa)
            "warmup_fraction": Uniform(0.0, 0.1),  # 6 % (RoBERTa)
        },
        defaults={"learning_rate": 3e-5, "batch_size": 32, "weight_decay": 0.01, "warmup_fraction": 0.06},
    )


def bert_large() -> SearchSpace:
    """BERT large and RoBERTa large.

    BERT large at times fails to train on small data sets (BERT, section 4.1), so the learning rate stays within what
    the two papers tried, and the warmup is never left out: Mosbach et al. (2021, "On the Stability of Fine-tuning
    BERT") put such failures down to vanishing gradients early on and advise 2e-5 with a warmup over 10 % of training.
    """
    stable = SearchSpace(
        domains={"learning_rate": LogUniform(1e-5, 5e-5), "warmup_fraction": Uniform(0.05, 0.2)},
        defaults={"learning_rate": 2e-5, "warmup_fraction": 0.1},
    )
    return bert() | stable
