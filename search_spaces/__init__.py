"""What can be tuned. A recipe is a function that returns a search space; a spec names it."""

from collections.abc import Callable, Mapping

from search_spaces.bert import bert, bert_large
from search_spaces.domains import (
    Choice,
    Domain,
    IntUniform,
    LogIntUniform,
    LogUniform,
    SearchSpace,
    Uniform,
    Value,
    parse_domain,
)
from search_spaces.gpt2 import gpt2, gpt2_medium
from search_spaces.llama import llama

RECIPES: Mapping[str, Callable[[], SearchSpace]] = {
    "gpt2": gpt2,
    "gpt2_medium": gpt2_medium,
    "bert": bert,
    "bert_large": bert_large,
    "llama": llama,
}
"""What `search_space: NAME` can name."""

__all__ = [
    "RECIPES",
    "Choice",
    "Domain",
    "IntUniform",
    "LogIntUniform",
    "LogUniform",
    "SearchSpace",
    "Uniform",
    "Value",
    "parse_domain",
]
