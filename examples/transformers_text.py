"""A tiny BERT from a config of transformers learns to tell praise from complaint in 20 lines.

Nothing is downloaded.
"""

import argparse

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification

import minikeras

PRAISE = [
    "a warm and funny film with a great cast",
    "i loved every minute of it",
    "a lovely script",
    "the story is clever and the acting superb",
    "a wonderful surprise from start to end",
    "great music and a lovely plot",
    "the best film of the year so far",
    "i laughed a lot and cried a little",
    "superb photography and a clever plot",
    "the cast is wonderful and the script is great",
]
COMPLAINT = [
    "a cold and boring film with a weak cast",
    "i hated every minute of it",
    "a lazy script",
    "the story is silly and the acting awful",
    "a terrible mess from start to end",
    "dull music and a lazy plot",
    "the worst film of the year so far",
    "i yawned a lot and left a little early",
    "awful photography and a silly plot",
    "the cast is terrible and the script is dull",
]


def encode(lines, vocabulary):
    """Encode words as numbers from 1, with 0 after the end of a line.

    Returns the numbers, (lines, words), and a mask of the words.
    """
    numbers = []
    for line in lines:
        numbers.append(torch.tensor([vocabulary[word] for word in line.split()]))
    input_ids = pad_sequence(numbers, batch_first=True)
    return {"input_ids": input_ids, "attention_mask": (input_ids > 0).long()}


def loss_func(y_pred, y_true):
    return cross_entropy(y_pred.logits, y_true)  # y_pred is transformers' own output object


def accuracy(y_pred, y_true):
    return minikeras.accuracy(y_pred.logits, y_true)


def main(epochs):
    torch.manual_seed(0)
    lines = PRAISE + COMPLAINT
    labels = torch.tensor([1] * len(PRAISE) + [0] * len(COMPLAINT))
    words = sorted(set(" ".join(lines).split()))
    vocabulary = {word: number for number, word in enumerate(words, start=1)}
    config = BertConfig(
        vocab_size=len(vocabulary) + 1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = minikeras.Model(BertForSequenceClassification(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    model.compile(loss_func, optimizer, {"accuracy": accuracy})
    model.fit(epochs, (encode(lines, vocabulary), labels), batch_size=5)
    unseen = encode(["a clever and wonderful plot", "a boring and awful mess"], vocabulary)
    print("praise:", model.predict([(unseen,)]).logits.softmax(1)[:, 1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    main(parser.parse_args().epochs)
