"""Scores an exported model the plain way: `python -m trainables.score MODEL_FOLDER DATA_FOLDER TEXT_COLUMN...`.

Independent of the training on purpose: one row at a time, as anybody calls a tokenizer and a model.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trainables.batches import filler
from trainables.config import DataConfig
from trainables.data import read_texts


def score(model_folder: str, data: DataConfig) -> float:
    """Accuracy on the validation split. Long rows are cut where training cut them: the tokenizer knows."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    split = read_texts(data).splits["validation"]
    found = []
    with torch.inference_mode():
        for texts in split.texts:
            inputs = tokenizer(*([text] for text in texts), truncation=True, return_tensors="pt")
            if not inputs["input_ids"].numel():  # an empty text, of which a classifier has nothing to read
                inputs = {"input_ids": torch.tensor([[filler(tokenizer)]])}
            found.append(int(model(**inputs).logits.argmax()))
    return float(np.mean(np.asarray(found) == split.labels))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("text", nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(score(options.model, DataConfig(path=options.data, text=tuple(options.text))))
