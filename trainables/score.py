"""Scores an exported model the plain way: `python -m trainables.score MODEL_FOLDER DATA_FOLDER TEXT_COLUMN...`.

Independent of the training loop on purpose: one row at a time, no padding, no ColossalAI.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trainables.batches import encode, pad
from trainables.config import DataConfig
from trainables.data import read_texts


def score(model_folder: str, data: DataConfig, max_length: int = 128) -> float:
    """Accuracy on the validation split. `max_length` is the training's: longer rows were cut there too."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    split = read_texts(data).splits["validation"]
    encoded = encode(tokenizer, split.texts, max_length)
    found = []
    with torch.inference_mode():
        for row in range(len(split.labels)):
            arrays = pad(encoded, np.array([row]), tokenizer.pad_token_id, int(encoded.lengths[row]))
            inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
            found.append(int(model(**inputs).logits.argmax()))
    return float(np.mean(np.asarray(found) == split.labels))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("text", nargs="+")
    parser.add_argument("--max-length", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(score(options.model, DataConfig(path=options.data, text=tuple(options.text)), options.max_length))
