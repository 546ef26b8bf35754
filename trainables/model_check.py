"""Whether models can be built, found out in a process of its own, for it takes torch and Transformers.

Reads a list of `model` sections as JSON on standard input; its last line is the list of what is wrong with them.
"""

from __future__ import annotations

import json
import sys

from trainables.config import ModelConfig
from trainables.errors import ModelError
from trainables.model import check_builds


def main() -> None:
    found = []
    for section in json.load(sys.stdin):
        try:
            check_builds(ModelConfig(**section))
        except ModelError as error:
            found += [problem.to_json() for problem in error.problems]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
