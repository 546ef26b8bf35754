"""Scores an exported model the plain way: `python -m trainables.score MODEL_FOLDER DATA_FOLDER TEXT_COLUMN...`.

Independent of the training loop on purpose: one row at a time, no padding, no ColossalAI.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trainables.batches import encode
from trainables.config import DataConfig
from trainables.data import read_texts


def score(model_folder: str, data: DataConfig, max_length: int = 512) -> float:
    """Accuracy on the validation split."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    split = read_texts(data).splits["validation"]
    encoded = encode(tokenizer, split.texts, max_length)
    with torch.inference_mode():
        found = [
            int(model(input_ids=torch.as_tensor([list(encoded.row(row))])).logits.argmax())
            for row in range(len(split.labels))
        ]
    return float(np.mean(np.asarray(found) == split.labels))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(score(sys.argv[1], DataConfig(path=sys.argv[2], text=tuple(sys.argv[3:]))))
