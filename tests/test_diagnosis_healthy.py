"""`model.diagnose` raises no false alarm: nothing is found in set-ups that are healthy."""

import numpy as np
import pytest
import torch
from helpers.examples import EXAMPLES, first_fit
from helpers.set_ups import (
    DIGIT_CLASSES,
    DIGITS,
    adam,
    compiled,
    digits,
    mlp,
    split,
    to_tensor,
    train_quietly,
)
from sklearn import datasets
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import minikeras

SET_UPS = {}


def healthy(build):
    """Add a function to the table: it returns a model, dl_train and dl_val."""
    SET_UPS[build.__name__] = build
    return build


OPTIMIZERS = {
    "adam": adam,
    "adam with 0.01": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 3e-4),
    "sgd with 0.1": lambda p: torch.optim.SGD(p, 0.1),
    "sgd with 0.01": lambda p: torch.optim.SGD(p, 0.01),
    "sgd with momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "the default": None,
}
for _name, _optimizer in OPTIMIZERS.items():
    SET_UPS[f"digits, {_name}"] = lambda _optimizer=_optimizer: digits(mlp(64, 10), _optimizer)


@healthy
def digits_raw():
    return (
        compiled(mlp(64, 10), nn.CrossEntropyLoss(), adam),
        *split(DIGITS * 16, DIGIT_CLASSES, 1400),
    )


@healthy
def digits_cnn():
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return (
        compiled(net, nn.CrossEntropyLoss(), adam),
        *split(DIGITS.reshape(-1, 1, 8, 8), DIGIT_CLASSES, 1400),
    )


@healthy
def iris():
    X, y = datasets.load_iris(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    p = np.random.RandomState(0).permutation(150)
    return (
        compiled(mlp(4, 3, 16), nn.CrossEntropyLoss(), lambda p: torch.optim.Adam(p, 0.01)),
        *split(to_tensor(X[p]), to_tensor(y[p], torch.long), 120),
    )


@healthy
def iris_raw_loader():
    X, y = datasets.load_iris(return_X_y=True)
    return (
        compiled(mlp(4, 3, 16), nn.CrossEntropyLoss(), lambda p: torch.optim.Adam(p, 0.01)),
        DataLoader(TensorDataset(to_tensor(X), to_tensor(y, torch.long)), 16, shuffle=True),
        None,
    )


@healthy
def wine():
    X, y = datasets.load_wine(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    p = np.random.RandomState(0).permutation(len(X))
    return (
        compiled(mlp(13, 3, 32, nn.Tanh), nn.CrossEntropyLoss(), adam),
        *split(to_tensor(X[p]), to_tensor(y[p], torch.long), 130),
    )


@healthy
def breast():
    X, y = datasets.load_breast_cancer(return_X_y=True, as_frame=True)
    X = (X - X.mean()) / X.std()
    return (
        compiled(mlp(30, 1, 32), nn.BCEWithLogitsLoss(), adam),
        (X[:400], y[:400].astype(float).to_frame()),
        (X[400:], y[400:].astype(float).to_frame()),
    )


@healthy
def breast_bce():
    X, y = datasets.load_breast_cancer(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    return (
        compiled(nn.Sequential(mlp(30, 1, 32), nn.Sigmoid()), nn.BCELoss(), adam),
        *split(to_tensor(X), to_tensor(y)[:, None], 400),
    )


@healthy
def diabetes():
    X, y = datasets.load_diabetes(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    y = (y - y.mean()) / y.std()
    return (
        compiled(mlp(10, 1, 32), nn.MSELoss(), adam),
        *split(to_tensor(X), to_tensor(y)[:, None], 350),
    )


@healthy
def diabetes_l1():
    X, y = datasets.load_diabetes(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    y = (y - y.mean()) / y.std()
    return (
        compiled(
            mlp(10, 1, 32), nn.SmoothL1Loss(), lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)
        ),
        *split(to_tensor(X), to_tensor(y)[:, None], 350),
    )


@healthy
def diabetes_raw_X():
    X, y = datasets.load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std()
    return (
        compiled(mlp(10, 1, 32), nn.MSELoss(), adam),
        *split(to_tensor(X), to_tensor(y)[:, None], 350),
    )


@healthy
def linnerud():
    X, y = datasets.load_linnerud(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    y = StandardScaler().fit_transform(y)
    return (compiled(mlp(3, 3, 16), nn.MSELoss(), adam), (to_tensor(X), to_tensor(y)), None)


@healthy
def moons():
    X, y = datasets.make_moons(500, noise=0.2, random_state=0)
    return (
        compiled(mlp(2, 1, 32), nn.BCEWithLogitsLoss(), lambda p: torch.optim.Adam(p, 0.01)),
        *split(to_tensor(X), to_tensor(y)[:, None], 400),
    )


@healthy
def rare():
    X, y = datasets.make_classification(1000, weights=[0.93], random_state=0)
    return (
        compiled(mlp(20, 1, 32), nn.BCEWithLogitsLoss(), adam),
        *split(to_tensor(X), to_tensor(y)[:, None], 800),
    )


@healthy
def regression():
    X, y = datasets.make_regression(500, 10, noise=5, random_state=0)
    return (
        compiled(mlp(10, 1, 32), nn.MSELoss(), adam),
        *split(to_tensor(X), to_tensor((y - y.mean()) / y.std())[:, None], 400),
    )


@healthy
def linear():
    X = torch.randn(400, 3)
    y = X @ torch.tensor([[1.0], [-2], [0.5]]) + 0.5 + 0.1 * torch.randn(400, 1)
    return (
        compiled(nn.Linear(3, 1), nn.MSELoss(), lambda p: torch.optim.SGD(p, 0.05)),
        *split(X, y, 300),
    )


@healthy
def text():
    generator = torch.Generator().manual_seed(0)
    X = torch.randint(1, 200, (600, 20), generator=generator)
    X[:, 15:] = 0
    y = (X[:, :5] < 60).sum(1).gt(1).long()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(200, 16, padding_idx=0)
            self.l = nn.LSTM(16, 32, batch_first=True)
            self.o = nn.Linear(32, 2)

        def forward(self, x):
            return self.o(self.l(self.e(x))[0].mean(1))

    return (compiled(Net(), nn.CrossEntropyLoss(), adam), *split(X, y, 500))


@healthy
def gru_windows():
    t = torch.arange(700.0) / 10
    v = torch.sin(t) + 0.1 * torch.randn(700, generator=torch.Generator().manual_seed(0))
    X = torch.stack([v[i : i + 20] for i in range(670)])[..., None]
    y = torch.stack([v[i + 20 : i + 23] for i in range(670)])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.GRU(1, 32, batch_first=True)
            self.o = nn.Linear(32, 3)

        def forward(self, x):
            return self.o(self.l(x)[0][:, -1])

    return (
        compiled(Net(), nn.MSELoss(), adam),
        DataLoader(TensorDataset(X[:500], y[:500]), 32),
        DataLoader(TensorDataset(X[500:], y[500:]), 32),
    )


@healthy
def transformer():
    generator = torch.Generator().manual_seed(0)
    X = torch.randint(0, 50, (500, 12), generator=generator)
    y = X[:, 0] % 3

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(50, 32)
            self.p = nn.Parameter(torch.zeros(12, 32))
            self.t = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2
            )
            self.o = nn.Linear(32, 3)

        def forward(self, x):
            return self.o(self.t(self.e(x) + self.p).mean(1))

    return (compiled(Net(), nn.CrossEntropyLoss(), adam), *split(X, y, 400))


@healthy
def lm():
    generator = torch.Generator().manual_seed(0)
    X = torch.randint(0, 30, (400, 10), generator=generator)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(30, 32)
            self.l = nn.LSTM(32, 32, batch_first=True)
            self.o = nn.Linear(32, 30)
            self.o.weight = self.e.weight

        def forward(self, x):
            return self.o(self.l(self.e(x))[0]).transpose(1, 2)

    return (compiled(Net(), nn.CrossEntropyLoss(), adam), (X[:, :-1], X[:, 1:]), None)


@healthy
def autoencoder():
    net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64), nn.Sigmoid())
    return (
        compiled(net, nn.BCELoss(), adam),
        (DIGITS[:1400], DIGITS[:1400]),
        (DIGITS[1400:], DIGITS[1400:]),
    )


@healthy
def autoencoder_mse():
    net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64))
    return (
        compiled(net, nn.MSELoss(), adam),
        (DIGITS[:1400], DIGITS[:1400]),
        (DIGITS[1400:], DIGITS[1400:]),
    )


@healthy
def multilabel():
    X, y = datasets.make_multilabel_classification(500, random_state=0)
    X = StandardScaler().fit_transform(X)
    return (
        compiled(mlp(20, 5, 32), nn.BCEWithLogitsLoss(), adam),
        *split(to_tensor(X), to_tensor(y), 400),
    )


@healthy
def dropout():
    return (
        compiled(
            nn.Sequential(
                nn.Linear(64, 128),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Linear(128, 128),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Linear(128, 10),
            ),
            nn.CrossEntropyLoss(),
            adam,
        ),
        *split(DIGITS, DIGIT_CLASSES, 1400),
    )


@healthy
def batchnorm():
    return (
        compiled(mlp(64, 10, 64, nn.ReLU, nn.BatchNorm1d(64)), nn.CrossEntropyLoss(), adam),
        *split(DIGITS, DIGIT_CLASSES, 1400),
    )


@healthy
def layernorm():
    return (
        compiled(
            mlp(64, 10, 64, nn.GELU, nn.LayerNorm(64)),
            nn.CrossEntropyLoss(),
            lambda p: torch.optim.AdamW(p, 0.001),
        ),
        *split(DIGITS, DIGIT_CLASSES, 1400),
    )


@healthy
def resnet():

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(channels)
            self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.last_norm = nn.BatchNorm2d(channels)

        def forward(self, x):
            return torch.relu(x + self.last_norm(self.second(torch.relu(self.norm(self.first(x))))))

    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        Block(16),
        Block(16),
        Block(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    return (
        compiled(
            net,
            nn.CrossEntropyLoss(),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.0001),
        ),
        *split(DIGITS.reshape(-1, 1, 8, 8), DIGIT_CLASSES, 1400),
    )


@healthy
def two_inputs():

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 16)
            self.b = nn.Embedding(10, 16)
            self.o = nn.Linear(16, 1)

        def forward(self, values, choices):
            return self.o(torch.relu(self.a(values) + self.b(choices)))

    X = torch.randn(500, 4)
    choices = torch.randint(0, 10, (500,))
    y = X[:, :1] + choices[:, None].float() / 10
    return (
        compiled(Net(), nn.MSELoss(), adam),
        ((X[:400], choices[:400]), y[:400]),
        ((X[400:], choices[400:]), y[400:]),
    )


@healthy
def dict_outputs():

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(64, 64)
            self.d = nn.Linear(64, 10)
            self.p = nn.Linear(64, 1)

        def forward(self, x):
            hidden = torch.relu(self.f(x))
            return {"digit": self.d(hidden), "parity": self.p(hidden)}

    model = Net()
    model.compile(
        {"digit": nn.CrossEntropyLoss(), "parity": (nn.BCEWithLogitsLoss(), 0.5)},
        torch.optim.Adam(model.parameters()),
        device="cpu",
    )
    bs = [
        (
            DIGITS[i : i + 32],
            {
                "digit": DIGIT_CLASSES[i : i + 32],
                "parity": (DIGIT_CLASSES[i : i + 32, None] % 2).float(),
            },
        )
        for i in range(0, 1400, 32)
    ]
    return (model, bs, None)


@healthy
def regularized():
    net = minikeras.Model(mlp(64, 10))
    return (
        compiled(net, minikeras.Regularized(nn.CrossEntropyLoss(), net, l1=0.0001, l2=0.001), adam),
        *split(DIGITS, DIGIT_CLASSES, 1400),
    )


@healthy
def focal():
    X, y = datasets.make_classification(1000, weights=[0.9], random_state=0)
    return (
        compiled(nn.Sequential(mlp(20, 1, 32), nn.Sigmoid()), minikeras.FocalLoss(), adam),
        *split(to_tensor(X), to_tensor(y)[:, None], 800),
    )


@healthy
def weights():
    X, y = datasets.make_classification(600, random_state=0)
    return (
        compiled(mlp(20, 1, 32), nn.BCEWithLogitsLoss(reduction="none"), adam),
        (to_tensor(X), to_tensor(y)[:, None], torch.rand(600) + 0.5),
        None,
    )


@healthy
def iterable():

    class D(IterableDataset):
        def __iter__(self):
            rng = np.random.RandomState(0)
            for _ in range(500):
                x = rng.randn(5).astype("float32")
                yield (x, np.float32([x.sum() > 0]))

    return (compiled(mlp(5, 1, 32), nn.BCEWithLogitsLoss(), adam), DataLoader(D(), 32), None)


@healthy
def f64():
    return (
        compiled(mlp(64, 10).double(), nn.CrossEntropyLoss(), adam),
        *split(DIGITS.double(), DIGIT_CLASSES, 1400),
    )


@healthy
def bf16():
    return (
        compiled(mlp(64, 10), nn.CrossEntropyLoss(), adam, precision="bf16"),
        *split(DIGITS, DIGIT_CLASSES, 1400),
    )


@healthy
def accumulate():
    return (
        compiled(mlp(64, 10), nn.CrossEntropyLoss(), adam, accumulate=4, clip_grad_norm=1.0),
        *split(DIGITS, DIGIT_CLASSES, 1400),
    )


@healthy
def few_rows():
    X = torch.randn(20, 4)
    return (compiled(mlp(4, 1, 16), nn.MSELoss(), adam), (X, X.sum(1, keepdim=True)), None)


@healthy
def trained():
    model, dl_train, dl_val = SET_UPS["digits, adam"]()
    train_quietly(model, dl_train, dl_val, epochs=15)
    return model, dl_train, dl_val


@healthy
def trained_more():
    model, dl_train, dl_val = SET_UPS["breast"]()
    train_quietly(model, dl_train, dl_val, epochs=6)
    return model, dl_train, dl_val


@healthy
def loaded():
    model, dl_train, dl_val = SET_UPS["digits, adam"]()
    train_quietly(model, dl_train, dl_val, epochs=15)
    model.compile(nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 0.0001), device="cpu")
    return model, dl_train, dl_val


@healthy
def finetune():
    net = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    minikeras.freeze(net[0])
    minikeras.freeze(net[2])
    model = minikeras.Model(net)
    model.compile(nn.CrossEntropyLoss(), torch.optim.Adam(net[4].parameters(), 0.001), device="cpu")
    return (model, *split(DIGITS, DIGIT_CLASSES, 1400))


@healthy
def zero_last():
    net = mlp(64, 10)
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    return (compiled(net, nn.CrossEntropyLoss(), adam), *split(DIGITS, DIGIT_CLASSES, 1400))


@healthy
def orthogonal():
    net = mlp(64, 10)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
    return (compiled(net, nn.CrossEntropyLoss(), adam), *split(DIGITS, DIGIT_CLASSES, 1400))


@healthy
def spectral():
    net = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 10)
    )
    return (compiled(net, nn.CrossEntropyLoss(), adam), *split(DIGITS, DIGIT_CLASSES, 1400))


@healthy
def onehot():
    rng = np.random.RandomState(0)
    choices = rng.choice(30, 600, p=np.r_[[0.5, 0.3], np.full(28, 0.2 / 28)])
    X = np.eye(30)[choices]
    X = np.c_[X, rng.randn(600, 3)]
    y = X[:, 0] + X[:, -1] > 0.5
    return (
        compiled(mlp(33, 1, 32), nn.BCEWithLogitsLoss(), adam),
        *split(to_tensor(X), to_tensor(y)[:, None], 500),
    )


@healthy
def leaky_scheduler():
    return (
        compiled(
            mlp(64, 10, 64, nn.LeakyReLU),
            nn.CrossEntropyLoss(),
            lambda p: torch.optim.NAdam(p, 0.002),
        ),
        *split(DIGITS, DIGIT_CLASSES, 1400),
    )


@healthy
def lambda_loss():
    return (
        compiled(
            mlp(64, 10), lambda a, b: nn.functional.cross_entropy(a, b, label_smoothing=0.1), adam
        ),
        *split(DIGITS, DIGIT_CLASSES, 1400),
    )


@healthy
def poisson():
    X = torch.randn(500, 5)
    y = torch.poisson((X[:, :1] * 0.5).exp())
    return (compiled(mlp(5, 1, 32), nn.PoissonNLLLoss(), adam), *split(X, y, 400))


@healthy
def seg():
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(200, 1, 12, 12, generator=generator)
    y = (X[:, 0] > 0.5).long()
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    return (compiled(net, nn.CrossEntropyLoss(), adam), *split(X, y, 160))


@healthy
def gan():

    class G(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.g = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
            self.d = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
            self.b = nn.BCEWithLogitsLoss()

        def forward(self, z):
            return self.g(z)

        def train_step(self, features, labels, sample_weight=None):
            z = torch.randn(len(features), 4)
            fake = self.g(z)
            one = torch.ones(len(features), 1)
            dl = self.b(self.d(features), one) + self.b(self.d(fake.detach()), 0 * one)
            self.backward(dl, "d")
            self.optimizer_step("d")
            gl = self.b(self.d(fake), one)
            self.backward(gl, "g")
            self.optimizer_step("g")
            return {"d_loss": dl, "g_loss": gl}

    model = G()
    model.compile(
        nn.BCEWithLogitsLoss(),
        {
            "g": torch.optim.Adam(model.g.parameters(), 0.0002),
            "d": torch.optim.Adam(model.d.parameters(), 0.0002),
        },
        device="cpu",
    )
    return (model, [(torch.randn(32, 2),) for _ in range(10)], None)


@healthy
def contrastive_loss_over_the_batch():
    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.body = mlp(64, 16)

        def forward(self, x):
            return nn.functional.normalize(self.body(x), dim=1)

    def info_nce(embeddings, classes):
        is_self = torch.eye(len(classes), dtype=torch.bool)
        similar = (embeddings @ embeddings.T / 0.2).masked_fill(is_self, -1e9)
        is_same = (classes[:, None] == classes[None]) & ~is_self
        return -(similar.log_softmax(1) * is_same).sum() / is_same.sum().clamp(min=1)

    return compiled(Net(), info_nce), (DIGITS[:1000], DIGIT_CLASSES[:1000]), None


@healthy
def masked_tokens():
    tokens = torch.randint(3, 60, (400, 16))
    is_masked = torch.rand(400, 16) < 0.3
    labels = torch.full_like(tokens, -100)
    labels[is_masked] = tokens[is_masked]
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(60, 32)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.fc = nn.Linear(32, 60)

        def forward(self, x):
            return self.fc(self.encoder(self.embedding(x))).transpose(1, 2)

    features = tokens.masked_fill(is_masked, 1)
    return compiled(Net(), nn.CrossEntropyLoss()), (features, labels), None


@healthy
def warm_up_of_a_scheduler():
    model, *data = digits(mlp(64, 10))
    torch.optim.lr_scheduler.LinearLR(model.optimizer, 1e-3, total_iters=100)
    return model, *data


@healthy
def raw_features_into_batch_norm():
    X = torch.rand(500, 4) * 1000
    net = nn.Sequential(nn.BatchNorm1d(4), mlp(4, 1))
    return compiled(net, nn.HuberLoss()), (X, X.sum(1, keepdim=True) / 1000), None


@healthy
def raw_targets_that_are_learnt():
    X = torch.randn(500, 4)
    y = X.sum(1, keepdim=True) * 40 + 200
    model = compiled(mlp(4, 1), nn.MSELoss(), lambda p: torch.optim.Adam(p, 1e-2))
    return train_quietly(model, (X, y), epochs=60), (X, y), None


@healthy
def lists_of_different_lengths():
    lengths = np.random.randint(3, 15, 300)
    rows = [(torch.randint(1, 50, (int(n),)), int(n) % 2) for n in lengths]

    def collate(batch):
        tokens = nn.utils.rnn.pad_sequence([row for row, _ in batch], batch_first=True)
        return tokens, torch.tensor([label for _, label in batch])

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 16, padding_idx=0)
            self.fc = nn.Linear(16, 2)

        def forward(self, x):
            return self.fc(self.embedding(x).sum(1))

    loader = DataLoader(rows, 32, shuffle=True, collate_fn=collate)
    return compiled(Net(), nn.CrossEntropyLoss()), loader, None


@healthy
def mixup_in_a_custom_step():
    class Net(minikeras.Model):
        def train_step(self, features, labels, sample_weight=None):
            other = torch.randperm(len(features))
            targets = nn.functional.one_hot(labels, 10).float()
            mixed = 0.7 * features + 0.3 * features[other]
            return super().train_step(mixed, 0.7 * targets + 0.3 * targets[other])

    return digits(Net(mlp(64, 10)))


@healthy
def vae():
    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(64, 8)
            self.decoder = mlp(4, 64, 32)

        def forward(self, x):
            mean, log_variance = self.encoder(x).chunk(2, 1)
            drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp()
            return self.decoder(drawn), mean, log_variance

    def loss_func(outputs, x):
        scores, mean, log_variance = outputs
        distance = nn.functional.binary_cross_entropy_with_logits(scores, x, reduction="none")
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp())
        return (distance.sum(1) + divergence.sum(1)).mean()

    return compiled(Net(), loss_func), (DIGITS[:1000], DIGITS[:1000]), None


@pytest.mark.parametrize("name", SET_UPS)
def test_nothing_is_found_in_a_healthy_set_up(name):
    torch.manual_seed(0)
    np.random.seed(0)
    model, dl_train, dl_val = SET_UPS[name]()
    diagnosis = model.diagnose(dl_train, dl_val)
    assert diagnosis.warnings == []
    assert [found for found in diagnosis.findings if found.found.startswith("not made")] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_nothing_is_found_in_an_example(path, monkeypatch, tmp_path):
    model, dl_train, dl_val, options = first_fit(path, monkeypatch, tmp_path)
    diagnosis = model.diagnose(dl_train, dl_val, **options)
    assert diagnosis.warnings == []
    assert [found for found in diagnosis.findings if found.found.startswith("not made")] == []
