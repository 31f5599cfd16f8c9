"""`model.diagnose` raises no false alarm for kinds of networks, losses and steps that are rarer.

Among them are losses that may be negative, steps of the user's own, graphs, sets, and generators.
"""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers.set_ups import DIGIT_CLASSES, DIGITS, compiled, digits, mlp, split
from scipy import sparse
from sklearn import datasets
from torch import nn
from torch.utils.data import DataLoader

import minikeras

SET_UPS = {}


def healthy(build):
    """Add a function to the table: it returns a model, dl_train and dl_val."""
    SET_UPS[build.__name__] = build
    return build


def regression_rows(rows=600, columns=5, noise=0.3):
    X = torch.randn(rows, columns)
    y = X[:, :1] + torch.sin(2 * X[:, 1:2]) + noise * torch.randn(rows, 1)
    return X, y


# --- layers ---------------------------------------------------------------------------------------


@healthy
def lazy_layers_with_batch_norm():
    net = nn.Sequential(
        nn.LazyConv2d(8, 3),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(32),
        nn.LazyBatchNorm1d(),
        nn.ReLU(),
        nn.LazyLinear(10),
    )
    return digits(net, None, X=DIGITS.reshape(-1, 1, 8, 8))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


@healthy
def residual_network_without_norm():
    blocks = [Residual(64) for _ in range(10)]
    return digits(nn.Sequential(nn.Linear(64, 64), *blocks, nn.Linear(64, 10)))


@healthy
def residual_network_that_begins_as_the_identity():
    blocks = [Residual(64) for _ in range(8)]
    for block in blocks:
        nn.init.zeros_(block.second.weight)
        nn.init.zeros_(block.second.bias)
    return digits(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), *blocks, nn.Linear(64, 10)))


class Mixture(nn.Module):
    def __init__(self, inputs, outputs, experts=4, chosen=None):
        super().__init__()
        self.gate = nn.Linear(inputs, experts)
        self.experts = nn.ModuleList([mlp(inputs, outputs, 32) for _ in range(experts)])
        self.chosen = chosen

    def forward(self, x):
        scores = self.gate(x)
        if self.chosen is not None:
            if self.training:  # so that each expert gets rows: Shazeer et al. 2017
                scores = scores + torch.randn_like(scores)
            lowest = scores.topk(self.chosen, dim=1).values[:, -1:]
            scores = scores.masked_fill(scores < lowest, -math.inf)
        answers = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (scores.softmax(1).unsqueeze(2) * answers).sum(1)


@healthy
def mixture_of_experts():
    return digits(Mixture(64, 10))


@healthy
def mixture_of_the_best_two_experts():
    return digits(Mixture(64, 10, experts=8, chosen=2))


@healthy
def gated_linear_units():
    net = nn.Sequential(
        nn.Linear(64, 128), nn.GLU(), nn.Linear(64, 128), nn.GLU(), nn.Linear(64, 10)
    )
    return digits(net)


@healthy
def weight_norm():
    normed = torch.nn.utils.parametrizations.weight_norm
    net = nn.Sequential(
        normed(nn.Linear(64, 64)),
        nn.ReLU(),
        normed(nn.Linear(64, 64)),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    return digits(net)


@healthy
def self_normalizing():
    layers = []
    for _ in range(6):
        layers += [nn.Linear(64, 64), nn.SELU(), nn.AlphaDropout(0.05)]
    return digits(nn.Sequential(*layers, nn.Linear(64, 10)))


@healthy
def linear_layer_after_dropout():
    return digits(
        nn.Sequential(nn.Dropout(0.2), nn.Linear(64, 10)), lambda p: torch.optim.SGD(p, 0.5)
    )


@healthy
def tied_autoencoder():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(64, 16)
            self.bias = nn.Parameter(torch.zeros(64))

        def forward(self, x):
            return torch.sigmoid(F.linear(self.encoder(x), self.encoder.weight.T, self.bias))

    return compiled(Net(), nn.MSELoss()), (DIGITS[:1400], DIGITS[:1400]), None


@healthy
def embedding_bags():
    tokens = torch.randint(0, 500, (800, 12))
    labels = (tokens < 100).sum(1).gt(2).long()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(500, 16, sparse=True)
            self.fc = nn.Linear(16, 2)

        def forward(self, x):
            return self.fc(self.bag(x))

    model = minikeras.Model(Net())
    optimizers = {
        "sparse": torch.optim.SparseAdam(model.net.bag.parameters(), 1e-2),
        "dense": torch.optim.Adam(model.net.fc.parameters(), 1e-2),
    }
    model.compile(nn.CrossEntropyLoss(), optimizers, device="cpu")
    return model, *split(tokens, labels, 600)


@healthy
def packed_sequences():
    lengths = torch.randint(2, 12, (500,))
    X = torch.randn(500, 12, 3)
    for row, length in zip(X, lengths, strict=True):
        row[length:] = 0
    y = (X.sum(1)[:, 0] > 0).long()

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 24, batch_first=True)
            self.fc = nn.Linear(24, 2)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(
                x, lengths.cpu(), batch_first=True, enforce_sorted=False
            )
            return self.fc(self.gru(packed)[1][-1])

    train = ((X[:400], lengths[:400]), y[:400])
    return compiled(Net(), nn.CrossEntropyLoss()), train, ((X[400:], lengths[400:]), y[400:])


@healthy
def sets_with_a_mask():
    X = torch.randn(500, 9, 2)
    mask = torch.arange(9) < torch.randint(1, 10, (500, 1))
    y = (X * mask.unsqueeze(2)).sum(1).norm(dim=1, keepdim=True)

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.each = mlp(2, 32)
            self.all = mlp(32, 1)

        def forward(self, x, mask):
            weights = mask.unsqueeze(2).float()
            return self.all((self.each(x) * weights).sum(1) / weights.sum(1))

    return compiled(Net(), nn.L1Loss()), ((X, mask), y), None


@healthy
def graph_of_nodes():
    """One graph: a batch has its nodes as rows, its edges, and which nodes are for training."""
    nodes = 120
    classes = torch.randint(0, 3, (nodes,))
    X = F.one_hot(classes, 3).float() + torch.randn(nodes, 3)
    edges = torch.randint(0, nodes, (2, 900))
    edges = edges[:, (classes[edges[0]] == classes[edges[1]]) | (torch.rand(900) < 0.1)]

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 16)
            self.second = nn.Linear(16, 3)

        def forward(self, x, edges):
            adjacency = torch.eye(len(x))
            adjacency[edges[0], edges[1]] = 1
            adjacency = adjacency / adjacency.sum(1, keepdim=True)
            return adjacency @ self.second(torch.relu(adjacency @ self.first(x)))

    def split_batch(batch):
        return (batch["x"], batch["edges"]), batch["y"]

    known = torch.where(torch.rand(nodes) < 0.5, classes, -100)
    batch = {"x": X, "edges": edges, "y": known}
    model = compiled(
        Net(), nn.CrossEntropyLoss(), lambda p: torch.optim.Adam(p, 1e-2), split_batch=split_batch
    )
    return model, [batch], None


@healthy
def graphs_joined_into_one():
    def graph(label):
        nodes = int(torch.randint(4, 9, ()))
        X = torch.randn(nodes, 3) + label
        return X, torch.randint(0, nodes, (2, 3 * nodes)), label

    def collate(graphs):
        X = torch.cat([X for X, _, _ in graphs])
        sizes = torch.tensor([len(X) for X, _, _ in graphs])
        starts = sizes.cumsum(0) - sizes
        pairs = zip(graphs, starts, strict=True)
        edges = torch.cat([edges + start for (_, edges, _), start in pairs], 1)
        owners = torch.repeat_interleave(torch.arange(len(graphs)), sizes)
        labels = torch.tensor([label for _, _, label in graphs])
        return {"x": X, "edges": edges, "owners": owners}, labels

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 16)
            self.second = nn.Linear(16, 16)
            self.fc = nn.Linear(16, 2)

        def forward(self, x, edges, owners):
            hidden = torch.relu(self.first(x))
            hidden = hidden + torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])
            hidden = torch.relu(self.second(hidden))
            graphs = hidden.new_zeros(int(owners.max()) + 1, 16).index_add(0, owners, hidden)
            return self.fc(graphs)

    graphs = [graph(number % 2) for number in range(300)]
    loader = DataLoader(graphs, 25, shuffle=True, collate_fn=collate)
    return compiled(Net(), nn.CrossEntropyLoss()), loader, None


@healthy
def siamese_network():
    X = torch.randn(500, 2, 6)
    y = ((X[:, 0] - X[:, 1]).norm(dim=1) < 3.3).float()

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.body = mlp(6, 16)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, a, b):
            return 3 - self.scale * (self.body(a) - self.body(b)).norm(dim=1)

    return compiled(Net(), nn.BCEWithLogitsLoss()), ((X[:, 0], X[:, 1]), y), None


@healthy
def matrix_factorization():
    users = torch.randint(0, 60, (2000,))
    items = torch.randint(0, 80, (2000,))
    tastes, kinds = torch.randn(60, 3), torch.randn(80, 3)
    ratings = 3.5 + (tastes[users] * kinds[items]).sum(1).clamp(-2, 1.5)

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.users = nn.Embedding(60, 8)
            self.items = nn.Embedding(80, 8)
            self.bias = nn.Parameter(torch.tensor(3.5))
            nn.init.normal_(self.users.weight, std=0.1)
            nn.init.normal_(self.items.weight, std=0.1)

        def forward(self, users, items):
            return (self.users(users) * self.items(items)).sum(1) + self.bias

    model = compiled(Net(), nn.MSELoss(), lambda p: torch.optim.Adam(p, 1e-2))
    return model, ((users, items), ratings), None


@healthy
def u_net():
    X = torch.rand(120, 1, 16, 16)
    y = (F.avg_pool2d(X, 3, 1, 1) > 0.5).float()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Conv2d(1, 8, 3, padding=1)
            self.deep = nn.Conv2d(8, 16, 3, padding=1)
            self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
            self.last = nn.Conv2d(16, 1, 1)

        def forward(self, x):
            first = torch.relu(self.down(x))
            deep = torch.relu(self.deep(F.max_pool2d(first, 2)))
            return self.last(torch.cat([first, torch.relu(self.up(deep))], 1))

    def dice(scores, masks):
        shares = scores.sigmoid().flatten(1)
        masks = masks.flatten(1)
        both = (shares * masks).sum(1)
        return (1 - (2 * both + 1) / (shares.sum(1) + masks.sum(1) + 1)).mean()

    return compiled(Net(), dice, lambda p: torch.optim.Adam(p, 3e-3)), (X, y), None


@healthy
def deep_tanh():
    return digits(nn.Sequential(mlp(64, 64, 64, nn.Tanh), nn.Tanh(), mlp(64, 10, 64, nn.Tanh)))


@healthy
def vision_transformer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(1, 32, 2, stride=2)
            self.first = nn.Parameter(torch.zeros(1, 1, 32))
            self.places = nn.Parameter(0.02 * torch.randn(1, 17, 32))
            layer = nn.TransformerEncoderLayer(
                32, 4, 64, dropout=0.1, batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.fc = nn.Linear(32, 10)

        def forward(self, x):
            patches = self.patches(x).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.first.expand(len(x), -1, -1), patches], 1) + self.places
            return self.fc(self.encoder(tokens)[:, 0])

    return digits(Net(), X=DIGITS.reshape(-1, 1, 8, 8))


@healthy
def causal_language_model():
    tokens = torch.randint(0, 40, (300, 1)) + torch.arange(17)
    tokens = tokens % 40

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(40, 32)
            self.places = nn.Embedding(16, 32)
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.fc = nn.Linear(32, 40, bias=False)
            self.fc.weight = self.embedding.weight

        def forward(self, x):
            hidden = self.embedding(x) + self.places(torch.arange(x.shape[1]))
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.fc(self.encoder(hidden, mask=mask, is_causal=True)).transpose(1, 2)

    def small_embeddings(net):
        nn.init.normal_(net.embedding.weight, std=0.02)
        return net

    model = compiled(small_embeddings(Net()), nn.CrossEntropyLoss())
    return model, (tokens[:, :-1], tokens[:, 1:]), None


@healthy
def adapters_in_a_frozen_network():
    """Low-rank adapters of the layers before a frozen head."""

    class Adapted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = minikeras.freeze(layer)
            self.down = nn.Linear(layer.in_features, 4, bias=False)
            self.up = nn.Linear(4, layer.out_features, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.layer(x) + self.up(self.down(x))

    model, train, val = digits(mlp(64, 10), lambda p: torch.optim.Adam(p, 1e-3))
    model.fit(2, train, verbose=0)
    net = model.net
    minikeras.freeze(net)
    adapted = nn.Sequential(Adapted(net[0]), net[1], Adapted(net[2]), net[3], net[4])
    model = minikeras.Model(adapted)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.compile(nn.CrossEntropyLoss(), torch.optim.Adam(trained, 1e-3), device="cpu")
    return model, train, val


@healthy
def prompt_of_a_frozen_transformer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.embedding = nn.Embedding(30, 16)
            self.encoder = nn.TransformerEncoder(layer, 1)
            self.fc = nn.Linear(16, 3)
            minikeras.freeze(self)
            self.prompt = nn.Parameter(0.5 * torch.randn(1, 8, 16))

        def forward(self, x):
            hidden = torch.cat([self.prompt.expand(len(x), -1, -1), self.embedding(x)], 1)
            return self.fc(self.encoder(hidden).mean(1))

    tokens = torch.randint(0, 30, (300, 6))
    model = minikeras.Model(Net())
    model.compile(nn.CrossEntropyLoss(), torch.optim.Adam([model.net.prompt], 1e-2), device="cpu")
    return model, (tokens, tokens[:, 0] % 3), None


@healthy
def sparse_rows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(0.2 * torch.randn(30, 16))
            self.fc = nn.Linear(16, 1)

        def forward(self, x):
            return self.fc(torch.relu(torch.sparse.mm(x, self.weight)))

    X = torch.randn(300, 30) * (torch.rand(300, 30) < 0.1)
    return compiled(Net(), nn.MSELoss()), (X.to_sparse(), X.sum(1, keepdim=True)), None


@healthy
def sparse_matrix_of_scipy():
    X = torch.randn(300, 30) * (torch.rand(300, 30) < 0.2)
    return compiled(mlp(30, 1), nn.MSELoss()), (sparse.csr_matrix(X), X.sum(1, keepdim=True)), None


@healthy
def table_with_nullable_columns():
    rng = np.random.default_rng(0)
    size = pd.array(rng.normal(size=200), "Float64")
    X = pd.DataFrame({"size": size, "is_new": [True, False] * 100})
    y = (X["size"] + X["is_new"]).astype(float).to_frame()
    return compiled(mlp(2, 1), nn.MSELoss()), (X, y), None


# --- losses ---------------------------------------------------------------------------------------


@healthy
def soft_labels():
    targets = F.one_hot(DIGIT_CLASSES, 10).float() * 0.8 + 0.02
    return digits(mlp(64, 10), y=targets)


@healthy
def soft_labels_of_a_teacher_that_is_hardly_sure():
    X = torch.randn(600, 8)
    targets = (0.3 * X @ torch.randn(8, 6)).softmax(1)
    return compiled(mlp(8, 6), nn.CrossEntropyLoss()), *split(X, targets, 500)


@healthy
def loss_far_above_zero_at_its_lowest():
    X, y = regression_rows()

    def loss_func(y_pred, y_true):
        return 20 + F.mse_loss(y_pred, y_true)

    return compiled(mlp(5, 1), loss_func), *split(X, y, 500)


@healthy
def counts_near_one():
    X = torch.randn(600, 5)
    y = torch.poisson((0.3 * X[:, :1]).exp())
    return compiled(mlp(5, 1), nn.PoissonNLLLoss()), *split(X, y, 500)


@healthy
def distilled_from_a_teacher_inside():
    class Student(minikeras.Model):
        def __init__(self, teacher):
            super().__init__()
            self.student = mlp(64, 10, 16)
            self.teacher = teacher
            minikeras.freeze(teacher)

        def forward(self, x):
            if not self.training:
                return self.student(x)
            return self.student(x), self.teacher(x)

    def loss_func(outputs, labels):
        if isinstance(outputs, torch.Tensor):
            return F.cross_entropy(outputs, labels)
        scores, taught = outputs
        soft = F.kl_div(scores.log_softmax(1), taught.softmax(1), reduction="batchmean")
        return F.cross_entropy(scores, labels) + soft

    teacher, train, _ = digits(mlp(64, 10))
    teacher.fit(3, train, verbose=0)
    return compiled(Student(teacher.net), loss_func), train, None


def quantile_loss(y_pred, y_true):
    levels = torch.tensor([0.1, 0.5, 0.9])
    error = y_true - y_pred
    return torch.maximum(levels * error, (levels - 1) * error).sum(1).mean()


@healthy
def quantiles():
    X, y = regression_rows()
    return compiled(mlp(5, 3), quantile_loss), *split(X, y, 500)


@healthy
def gaussian_likelihood():
    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.body = mlp(5, 2)

        def forward(self, x):
            mean, scale = self.body(x).chunk(2, 1)
            return mean, F.softplus(scale) + 1e-3

    def loss_func(outputs, y):
        mean, variance = outputs
        return F.gaussian_nll_loss(mean, y, variance)

    X, y = regression_rows(noise=0.05)
    return compiled(Net(), loss_func), *split(X, y, 500)


@healthy
def likelihood_of_a_distribution():
    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.body = mlp(5, 2)

        def forward(self, x):
            return self.body(x)

    def loss_func(outputs, y):
        mean, log_scale = outputs.chunk(2, 1)
        return -torch.distributions.Normal(mean, log_scale.exp()).log_prob(y).mean()

    X, y = regression_rows(noise=0.02)
    return compiled(Net(), loss_func, lambda p: torch.optim.Adam(p, 3e-3)), *split(
        0.1 * X, 0.05 * y, 500
    )


@healthy
def poisson_counts():
    X = torch.randn(800, 5)
    y = torch.poisson((2 + 0.5 * X[:, :1]).exp())
    return compiled(mlp(5, 1), nn.PoissonNLLLoss()), *split(X, y, 600)


@healthy
def mixture_density():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(1, 9)

        def forward(self, x):
            return self.body(x)

    def loss_func(outputs, y):
        weights, means, scales = outputs.chunk(3, 1)
        parts = torch.distributions.Normal(means, F.softplus(scales) + 0.05).log_prob(y)
        return -torch.logsumexp(weights.log_softmax(1) + parts, 1).mean()

    X = torch.rand(800, 1) * 2 - 1
    y = torch.where(torch.rand(800, 1) < 0.5, X, -X) + 0.05 * torch.randn(800, 1)
    return compiled(Net(), loss_func), *split(X, y, 600)


@healthy
def ordered_classes():
    """Cumulative links: one score, and a learnt threshold between neighboring classes."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(5, 1)
            self.thresholds = nn.Parameter(torch.linspace(-1.5, 1.5, 4))

        def forward(self, x):
            return self.body(x) - self.thresholds

    X, y = regression_rows()
    levels = torch.bucketize(y, torch.tensor([-1.5, -0.5, 0.5, 1.5]))
    above = (levels > torch.arange(4)).float()
    return compiled(Net(), nn.BCEWithLogitsLoss()), *split(X, above, 500)


@healthy
def many_rare_labels():
    X = torch.randn(1000, 10)
    y = (X @ torch.randn(10, 25) > 7.5).float()
    return compiled(mlp(10, 25), nn.BCEWithLogitsLoss()), *split(X, y, 800)


@healthy
def ranked_pairs():
    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.body = mlp(6, 1)

        def forward(self, better, worse):
            return self.body(better) - self.body(worse)

    X = torch.randn(600, 2, 6)
    value = X[..., 0] + X[..., 1].square()
    better = torch.where((value[:, 0] > value[:, 1])[:, None], X[:, 0], X[:, 1])
    worse = torch.where((value[:, 0] > value[:, 1])[:, None], X[:, 1], X[:, 0])
    model = compiled(Net(), lambda outputs, y: F.softplus(-outputs).mean())
    return model, ((better, worse), torch.ones(600, 1)), None


@healthy
def triplets():
    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.body = mlp(64, 16)

        def forward(self, anchor, same, other):
            return self.body(anchor), self.body(same), self.body(other)

    def loss_func(outputs, y):
        return F.triplet_margin_loss(*outputs, margin=0.5)

    order = DIGIT_CLASSES.argsort(stable=True)
    other = order.roll(400)
    features = (DIGITS[order], DIGITS[order.roll(1)], DIGITS[other])
    model = compiled(Net(), loss_func)
    return model, (features, torch.zeros(len(order))), None


@healthy
def two_views_of_each_row():
    """SimCLR: a batch has two augmented views, and the loss compares rows of the batch."""

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.body = mlp(64, 16)

        def forward(self, a, b):
            return F.normalize(self.body(a), dim=1), F.normalize(self.body(b), dim=1)

    def loss_func(outputs, labels):
        scores = outputs[0] @ outputs[1].T / 0.1
        return F.cross_entropy(scores, torch.arange(len(scores)))

    def noisy(X):
        return X + 0.1 * torch.randn_like(X)

    X = DIGITS[:1000]
    return compiled(Net(), loss_func), ((noisy(X), noisy(X)), torch.zeros(1000)), None


@healthy
def cosine_distance():
    X = torch.randn(600, 8)
    y = F.normalize(X @ torch.randn(8, 4), dim=1)

    def loss_func(outputs, targets):
        return -F.cosine_similarity(outputs, targets).mean()

    return compiled(mlp(8, 4), loss_func), *split(X, y, 500)


@healthy
def connectionist_temporal_classification():
    X = torch.randn(200, 15, 6)
    labels = torch.randint(1, 5, (200, 4))
    for place in range(4):
        X[:, 3 * place + 1, :5] += 3 * F.one_hot(labels[:, place], 5)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(6, 32, batch_first=True, bidirectional=True)
            self.fc = nn.Linear(64, 5)

        def forward(self, x):
            return self.fc(self.gru(x)[0]).log_softmax(2)

    def loss_func(outputs, labels):
        rows = len(outputs)
        lengths = torch.full((rows,), 15), torch.full((rows,), 4)
        return F.ctc_loss(outputs.transpose(0, 1), labels, *lengths)

    return compiled(Net(), loss_func), (X, labels), None


@healthy
def normalizing_flow():
    """The features are their own labels; the loss is a negative log-density, of any sign."""

    class Coupling(nn.Module):
        def __init__(self, is_first):
            super().__init__()
            self.net = mlp(1, 2, 32)
            self.is_first = is_first

        def forward(self, x):
            kept, moved = x.chunk(2, 1) if self.is_first else reversed(x.chunk(2, 1))
            shift, scale = self.net(kept).chunk(2, 1)
            scale = torch.tanh(scale)
            moved = moved * scale.exp() + shift
            parts = (kept, moved) if self.is_first else (moved, kept)
            return torch.cat(parts, 1), scale[:, 0]

    class Flow(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Coupling(number % 2 == 0) for number in range(4)])

        def forward(self, x):
            total = x.new_zeros(len(x))
            for layer in self.layers:
                x, scale = layer(x)
                total = total + scale
            return -0.5 * (x.square() + math.log(2 * math.pi)).sum(1) + total

    X = torch.tensor(datasets.make_moons(800, noise=0.05, random_state=0)[0]).float()
    model = compiled(Flow(), lambda log_density, y: -log_density.mean())
    return model, (X, torch.zeros(800)), None


@healthy
def policy_gradient():
    states = torch.randn(600, 4)
    actions = torch.randint(0, 3, (600,))
    returns = (actions == (states[:, 0] > 0).long()).float() + 0.1 * torch.randn(600)

    def loss_func(scores, labels):
        chosen = scores.log_softmax(1).gather(1, labels["action"].unsqueeze(1))[:, 0]
        advantage = labels["return"] - labels["return"].mean()
        return -(chosen * advantage).mean()

    model = compiled(mlp(4, 3), loss_func)
    return model, (states, {"action": actions, "return": returns}), None


# --- steps ----------------------------------------------------------------------------------------


@healthy
def cosine_schedule():
    model, *data = digits(mlp(64, 10), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    torch.optim.lr_scheduler.CosineAnnealingLR(model.optimizer, 20)
    return model, *data


@healthy
def one_cycle_schedule():
    model, *data = digits(mlp(64, 10))
    torch.optim.lr_scheduler.OneCycleLR(model.optimizer, 1e-2, total_steps=500)
    return model, *data


@healthy
def rates_by_layer():
    net = mlp(64, 10)
    groups = [
        {"params": net[0].parameters(), "lr": 1e-5},
        {"params": net[2].parameters(), "lr": 1e-4},
        {"params": net[4].parameters(), "lr": 1e-3},
    ]
    model = minikeras.Model(net)
    model.compile(nn.CrossEntropyLoss(), torch.optim.AdamW(groups), device="cpu")
    return model, *split(DIGITS, DIGIT_CLASSES, 1400)


@healthy
def an_optimizer_for_each_part():
    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.body = mlp(64, 32)
            self.head = nn.Linear(32, 10)

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))

    model = Net()
    optimizers = {
        "body": torch.optim.AdamW(model.body.parameters(), 3e-4),
        "head": torch.optim.SGD(model.head.parameters(), 0.1, momentum=0.9),
    }
    model.compile(nn.CrossEntropyLoss(), optimizers, device="cpu")
    return model, *split(DIGITS, DIGIT_CLASSES, 1400)


@healthy
def critic_with_a_gradient_penalty():
    """WGAN-GP: several critic steps for each step of the generator; the losses have any sign."""

    class GAN(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.generator = mlp(4, 2, 32)
            self.critic = mlp(2, 1, 32, nn.LeakyReLU)
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, z):
            return self.generator(z)

        def train_step(self, features, labels, sample_weight=None):
            fake = self.generator(torch.randn(len(features), 4))
            share = torch.rand(len(features), 1)
            between = (share * features + (1 - share) * fake.detach()).requires_grad_()
            (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
            penalty = 10 * (slope.norm(dim=1) - 1).square().mean()
            critic_loss = self.critic(fake.detach()).mean() - self.critic(features).mean() + penalty
            self.backward(critic_loss, "critic")
            self.optimizer_step("critic")
            generator_loss = -self.critic(self.generator(torch.randn(len(features), 4))).mean()
            self.count += 1
            if self.count % 3 == 0:
                self.backward(generator_loss, "generator")
                self.optimizer_step("generator")
            return {"loss": critic_loss, "generator_loss": generator_loss}

    model = GAN()
    optimizers = {
        "generator": torch.optim.Adam(model.generator.parameters(), 1e-4, betas=(0.5, 0.9)),
        "critic": torch.optim.Adam(model.critic.parameters(), 1e-4, betas=(0.5, 0.9)),
    }
    model.compile(nn.MSELoss(), optimizers, device="cpu")
    X = torch.tensor(datasets.make_moons(640, noise=0.05, random_state=0)[0]).float()
    return model, [(rows,) for rows in X.split(64)], None


@healthy
def momentum_encoder():
    """BYOL: the target is a moving average of the network, without a gradient."""

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.online = mlp(64, 16)
            self.predictor = nn.Linear(16, 16)
            self.target = copy.deepcopy(self.online).requires_grad_(False)

        def forward(self, x):
            return self.online(x)

        def train_step(self, features, labels, sample_weight=None):
            first = features + 0.1 * torch.randn_like(features)
            second = features + 0.1 * torch.randn_like(features)
            with torch.no_grad():
                wanted = self.target(second)
            found = self.predictor(self.online(first))
            loss = -F.cosine_similarity(found, wanted).mean()
            self.backward(loss)
            self.optimizer_step()
            with torch.no_grad():
                pairs = zip(self.target.parameters(), self.online.parameters(), strict=True)
                for old, new in pairs:
                    old.lerp_(new, 0.01)
            return {"loss": loss}

    return (
        compiled(Net(), nn.MSELoss()),
        DataLoader([(row, 0) for row in DIGITS[:640]], 64, shuffle=True),
        None,
    )


@healthy
def adversarial_rows():
    class Net(minikeras.Model):
        def train_step(self, features, labels, sample_weight=None):
            moved = features.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.compute_loss(self(moved), labels), moved)
            return super().train_step(features + 0.05 * slope.sign(), labels)

    return digits(Net(mlp(64, 10)))


@healthy
def denoising_diffusion():
    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.body = mlp(3, 2, 64, nn.SiLU)

        def forward(self, x, time):
            return self.body(torch.cat([x, time], 1))

        def train_step(self, features, labels, sample_weight=None):
            time = torch.rand(len(features), 1)
            noise = torch.randn_like(features)
            outputs = self((1 - time) * features + time * noise, time)
            loss = self.compute_loss(outputs, noise - features)
            self.backward(loss)
            self.optimizer_step()
            return {"loss": loss}

    X = torch.tensor(datasets.make_moons(640, noise=0.05, random_state=0)[0]).float()
    return (
        compiled(Net(), nn.MSELoss()),
        DataLoader([(row, 0) for row in X], 64, shuffle=True),
        None,
    )


@healthy
def trained_with_averages_and_schedules():
    model, *data = digits(mlp(64, 10), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    schedule = torch.optim.lr_scheduler.StepLR(model.optimizer, 3, 0.1)
    callbacks = [minikeras.LRScheduler(schedule), minikeras.EMA(0.9)]
    model.fit(8, *data, callbacks=callbacks, verbose=0)
    return model, *data


@healthy
def trained_to_the_end():
    model, *data = digits(mlp(64, 10), lambda p: torch.optim.Adam(p, 3e-3))
    model.fit(40, data[0], verbose=0)
    return model, *data


@healthy
def rows_drawn_by_weight():
    X, y = datasets.make_classification(1000, weights=[0.95], random_state=0)
    X, y = torch.tensor(X).float(), torch.tensor(y)
    weights = torch.where(y == 1, 10.0, 0.5)
    sampler = torch.utils.data.WeightedRandomSampler(weights, 1000)
    loader = DataLoader(torch.utils.data.TensorDataset(X, y), 32, sampler=sampler)
    return compiled(mlp(20, 2), nn.CrossEntropyLoss()), loader, None


@healthy
def few_rows_in_each_batch():
    net = nn.Sequential(nn.Linear(64, 32), nn.GroupNorm(4, 32), nn.ReLU(), nn.Linear(32, 10))
    model, train, val = digits(net, lambda p: torch.optim.SGD(p, 0.01, momentum=0.9))
    return model, [(X, y) for X, y in zip(train[0].split(2), train[1].split(2), strict=True)], val


@healthy
def noisy_targets():
    X = torch.randn(600, 8)
    y = 0.3 * X[:, :1] + torch.randn(600, 1)
    return compiled(mlp(8, 1), nn.MSELoss()), *split(X, y, 500)


@healthy
def physics_informed():
    """y' = -y with y(0) = 1: the loss differentiates the network with respect to its input."""

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.body = mlp(1, 1, 32, nn.Tanh)

        def forward(self, t):
            return 1 + t * self.body(t)

        def train_step(self, features, labels, sample_weight=None):
            t = features.clone().requires_grad_()
            y = self(t)
            (slope,) = torch.autograd.grad(y.sum(), t, create_graph=True)
            loss = self.compute_loss(slope, -y)
            self.backward(loss)
            self.optimizer_step()
            return {"loss": loss}

    t = torch.rand(512, 1) * 3
    return compiled(Net(), nn.MSELoss()), (t, torch.zeros(512, 1)), None


@pytest.mark.parametrize("name", SET_UPS)
def test_nothing_is_found_in_a_healthy_set_up_of_a_rarer_kind(name):
    torch.manual_seed(0)
    np.random.seed(0)
    model, dl_train, dl_val = SET_UPS[name]()
    diagnosis = model.diagnose(dl_train, dl_val)
    assert diagnosis.warnings == []
    assert [found for found in diagnosis.findings if found.found.startswith("not made")] == []
