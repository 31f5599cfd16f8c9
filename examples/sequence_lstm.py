"""Sequences of different lengths: an LSTM tells lines of verse from lines of prose.

A collate_fn packs the lines of a batch.
"""

import argparse

import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

import minikeras

VERSE = [
    "Shall I compare thee to a summer's day?",
    "Thou art more lovely and more temperate",
    "Rough winds do shake the darling buds of May",
    "And summer's lease hath all too short a date",
    "Tyger Tyger, burning bright",
    "In the forests of the night",
    "What immortal hand or eye",
    "Could frame thy fearful symmetry?",
    "O my Luve is like a red, red rose",
    "That's newly sprung in June",
]
PROSE = [
    "Please return the books to the desk before the end of the month",
    "The train leaves from platform two",
    "The committee will meet again on Tuesday",
    "Mix the flour with the butter and leave it in a cold place for an hour",
    "The shop on the corner sells bread, milk and newspapers",
    "Turn the screw to the left until the cover comes off",
    "Water boils at a lower temperature on a mountain",
    "He opened the door and asked for the bill",
    "The bridge is closed to lorries",
    "A copy of the form goes to the bank",
]


def pack(batch):  # [(letters of a line, label), ...]; the longest need not come first
    lines, labels = zip(*batch)
    return pack_sequence(lines, enforce_sorted=False), torch.tensor(labels)


class LineModel(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, 16)
        self.lstm = nn.LSTM(16, 32)
        self.fc = nn.Linear(32, 1)

    def forward(self, lines):  # a PackedSequence of letters; the LSTM sees no padding
        _, (last, _) = self.lstm(lines._replace(data=self.embedding(lines.data)))
        return self.fc(last[-1]).squeeze(1)  # (rows,), in the order of the batch


def main(epochs):
    torch.manual_seed(0)
    data = []
    for lines, label in [(VERSE, 1.0), (PROSE, 0.0)]:
        for line in lines:
            data.append((torch.tensor(list(line.encode())), label))
    model = LineModel()
    model.compile(nn.BCEWithLogitsLoss(), torch.optim.Adam(model.parameters(), lr=0.01))
    model.fit(epochs, DataLoader(data, batch_size=5, shuffle=True, collate_fn=pack))

    # on the lines that it was trained on: this shows only that they were learned by heart
    scores = model.predict(DataLoader(data, batch_size=8, collate_fn=pack))
    labels = torch.tensor([label for _, label in data])
    right = int(((scores > 0) == (labels > 0)).sum())
    print(f"{right} of {len(data)} lines told apart")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    main(**vars(parser.parse_args()))
