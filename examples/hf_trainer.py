"""A small BERT learns which module of Python a line of documentation is from, while the weights of `where` move.

python examples/hf_trainer.py
"""

import inspect
import re
import statistics
import subprocess
import tempfile
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from saltflat import Layerwise
from saltflat.integrations.huggingface import PerturbedTrainer
from saltflat.weights import Where, default


def documentation(length: int = 16) -> tuple[Any, int]:
    """Its longer lines as token ids, 0 for padding, each with its module; and how many tokens there are."""
    members = [(y, m) for y, module in enumerate((statistics, subprocess)) for _, m in inspect.getmembers(module)]
    texts = {(y, line) for y, member in members for line in (inspect.getdoc(member) or "").splitlines()}
    lines = [(y, *re.findall(r"\w+", line)[:length]) for y, line in sorted(texts) if len(line) > 30]
    number = {word: 1 + i for i, word in enumerate(sorted({word for _, *words in lines for word in words}))}
    ids = [[number[word] for word in words] + [0] * (length - len(words)) for _, *words in lines]
    rows = ((row, [min(n, 1) for n in row], line[0]) for row, line in zip(ids, lines, strict=True))
    return [{"input_ids": row, "attention_mask": mask, "labels": y} for row, mask, y in rows], 1 + len(number)


def but_embeddings(name: str, parameter: nn.Parameter) -> bool:
    return default(name, parameter) and "embeddings" not in name


def train(where: Where, steps: int = 200) -> tuple[nn.Module, float]:
    """The network, and the share of held-out lines that it knows."""
    torch.manual_seed(0)
    data, words = documentation()
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=words, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3, use_cpu=True,
            dataloader_pin_memory=False, disable_tqdm=True, report_to="none", save_strategy="no",
        )  # fmt: skip
        trainer = PerturbedTrainer(
            model, arguments, train_dataset=data[1::2], ball=Layerwise(5e-3), where=where, start_step=50
        )
        trainer.train()
        found: Any = trainer.predict(data[::2])
    return model, float((found.predictions.argmax(1) == found.label_ids).mean())


if __name__ == "__main__":
    print(f"held-out lines known, perturbed but for the embeddings: {train(but_embeddings)[1]:.1%}")
    print(f"held-out lines known, perturbed everywhere: {train(default)[1]:.1%}")
