"""Whether models can be built, found out in a process of its own, for it takes torch and Transformers.

Reads pairs of a `model` section and a `max_length` as JSON on standard input; answers, in one line, with the list of
what is wrong.
"""

from __future__ import annotations

import json
import sys

from trainables.config import ModelConfig
from trainables.errors import ModelError
from trainables.model import check_builds
from trainables.model_files import ANSWER


def main() -> None:
    found = []
    for section, max_length in json.load(sys.stdin):
        try:
            check_builds(ModelConfig(**section), max_length)
        except ModelError as error:
            found += [problem.to_json() for problem in error.problems]
    print(f"\n{ANSWER}{json.dumps(found)}")


if __name__ == "__main__":
    main()
