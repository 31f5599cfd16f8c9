"""Sequences of different lengths: a collate_fn packs them, and an LSTM reads whether a line is verse or prose."""

import argparse

import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

import minikeras

VERSE = """Shall I compare thee to a summer's day? / Thou art more lovely and more temperate /
Rough winds do shake the darling buds of May / And summer's lease hath all too short a date /
Tyger Tyger, burning bright / In the forests of the night / What immortal hand or eye /
Could frame thy fearful symmetry? / O my Luve is like a red, red rose / That's newly sprung in June"""
PROSE = """Please return the books to the desk before the end of the month. The train leaves from platform two.
The committee will meet again on Tuesday. Mix the flour with the butter and leave it in a cold place for an hour.
The shop on the corner sells bread, milk and newspapers. Turn the screw to the left until the cover comes off.
Water boils at a lower temperature on a mountain. He opened the door and asked for the bill.
The bridge is closed to lorries. A copy of the form goes to the bank"""


def packed(batch):  # [(letters of a line, label), ...]; the longest need not come first
    lines, labels = zip(*batch)
    return pack_sequence(lines, enforce_sorted=False), torch.tensor(labels)


class LineModel(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm, self.fc = (
            nn.Embedding(128, 16),
            nn.LSTM(16, 32),
            nn.Linear(32, 1),
        )

    def forward(self, lines):  # a PackedSequence of letters; no padding goes through the LSTM
        _, (last, _) = self.lstm(lines._replace(data=self.embedding(lines.data)))
        return self.fc(last[-1]).squeeze(1)  # (rows,), in the order of the batch


def main(epochs):
    torch.manual_seed(0)
    lines = {1.0: VERSE.replace("\n", " ").split(" / "), 0.0: PROSE.replace("\n", " ").split(". ")}
    data = [
        (torch.tensor(list(line.encode())), label) for label, kind in lines.items() for line in kind
    ]
    model = LineModel()
    model.compile(nn.BCEWithLogitsLoss(), torch.optim.Adam(model.parameters(), lr=0.01))
    model.fit(epochs, DataLoader(data, batch_size=5, shuffle=True, collate_fn=packed))
    scores = model.predict(
        DataLoader(data, batch_size=8, collate_fn=packed)
    )  # learnt by heart: no more is shown
    print(
        f"{sum((score > 0) == (label > 0) for score, (_, label) in zip(scores, data))} of {len(data)} lines told apart"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    main(**vars(parser.parse_args()))
