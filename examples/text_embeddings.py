"""Adversarial training on text: what moves is what the tokens are embedded as, and then the weights as well.

python examples/text_embeddings.py
"""

import inspect
import re
import statistics
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from saltflat import FGSM, L2, PGD, Layerwise, in_mode, perturbed
from saltflat.inputs import InputAdversary, zero
from saltflat.objectives import ce

FGM = FGSM(L2(0.05, box=None))  # u = eps g / ‖g‖ per text (Miyato, Dai, Goodfellow, arXiv 1605.07725)
K_PGD = PGD(L2(0.05, box=None), step_size=0.02, steps=5, start=zero)  # a random start would spend eps on padding


def lines() -> tuple[Tensor, Tensor, int]:
    """Lines of a module, no two alike, as numbers of words (N, 16), 0 for padding; which are code; and its words."""
    told = {line.strip() for _, m in inspect.getmembers(statistics) for line in (inspect.getdoc(m) or "").splitlines()}
    texts = sorted((told | {line.strip() for line in inspect.getsource(statistics).splitlines()}) - {""})
    cut = {tuple(re.findall(r"\w+|\S", text)[:16]): int(text not in told) for text in texts}
    number = {word: 1 + i for i, word in enumerate(sorted({word for words in cut for word in words}))}
    ids = [[number[word] for word in words] + [0] * (16 - len(words)) for words in cut]
    return torch.tensor(ids), torch.tensor(list(cut.values())), 1 + len(number)


def losses(model: Any, ids: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """Of every text, (N,), with its embedded tokens moved by u (N, T, D); padding stays where it is."""
    mask, embedded = (ids > 0).long(), model.get_input_embeddings()(ids)
    return ce(model(inputs_embeds=embedded + u * mask[..., None], attention_mask=mask).logits, y)


def step(model: Any, ids: Tensor, y: Tensor, attack: InputAdversary, optimizer: torch.optim.Optimizer) -> None:
    with in_mode(model, "eval"):
        u = attack(lambda u: losses(model, ids, y, u), torch.zeros_like(model.get_input_embeddings()(ids)))
    loss = lambda: losses(model, ids, y, u).mean()
    optimizer.zero_grad()
    with perturbed(model, loss, Layerwise(0.001)):
        loss().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


if __name__ == "__main__":
    ids, y, words = lines()
    shape: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for attack in (FGM, K_PGD):
        torch.manual_seed(0)
        model: Any = BertForSequenceClassification(BertConfig(vocab_size=words, **shape))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for rows in [rows for _ in range(6) for rows in torch.randperm(len(ids) // 2).tensor_split(20)]:
            step(model, ids[2 * rows], y[2 * rows], attack, optimizer)
        known = model.eval()(ids[1::2], (ids[1::2] > 0).long()).logits.argmax(1) == y[1::2]
        print(f"{attack.steps} steps of attack: {known.float().mean():.1%} of held-out lines known")
