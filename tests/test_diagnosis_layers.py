"""What `diagnose` finds in parameters, gradients, activations, BatchNorm and dropout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minikeras
from minikeras.diagnosis import Evidence
from minikeras.diagnosis.diagnose import NETWORK, TRAINING
from minikeras.diagnosis.layers import RELU

ROWS = 96
FILES = ("activations", "gradients", "modes", "parameters")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def find(model, data, **arguments):
    """Return the findings of the checks of layers, with no error in a check."""
    evidence = Evidence(model, data, None, 10, **arguments)
    findings = []
    for check in [*NETWORK, *TRAINING]:
        if check.__module__.rpartition(".")[2] in FILES:
            findings += check(evidence)
    return findings


def alarms(findings):
    return [finding for finding in findings if finding.level != "note"]


def table(classes=3, columns=8):
    X = torch.randn(ROWS, columns)
    return X, X[:, :classes].argmax(1)


def images(channels=1):
    X = torch.rand(ROWS, channels, 8, 8)
    return X, (X.mean((1, 2, 3)) > 0.5).long()


def tokens(length=12):
    X = torch.randint(20, (ROWS, length))
    return X, (X[:, 0] > 10).long()


def classify(net, optimizer=None, **options):
    model = net if isinstance(net, minikeras.Model) else minikeras.Model(net)
    model.compile(nn.CrossEntropyLoss(), optimizer, device="cpu", **options)
    return model


def mlp(*layers, width=32, classes=3, columns=8):
    return nn.Sequential(nn.Linear(columns, width), *layers, nn.Linear(width, classes))


# --- networks with nothing wrong ------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.lstm = kind(8, 16, num_layers=2, dropout=0.2, batch_first=True)
        self.fc = nn.Linear(16, 2)

    def forward(self, x):
        return self.fc(self.lstm(self.embedding(x))[0][:, -1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.positions = nn.Parameter(torch.zeros(12, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.fc = nn.Linear(16, 2)

    def forward(self, x):
        return self.fc(self.encoder(self.embedding(x) + self.positions).mean(1))


class Heads(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 32)
        self.kind = nn.Linear(32, 3)
        self.size = nn.Linear(32, 1)

    def forward(self, x):
        hidden = F.relu(self.body(x))
        return {"kind": self.kind(hidden), "size": self.size(hidden)}


class Gan(minikeras.Model):
    """A GAN whose generator is trained in every `every`-th step."""

    def __init__(self, every=1):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        self.every = every
        self.count = 0

    def forward(self, noise):
        return self.generator(noise)  # and not the features

    def train_step(self, features, labels, sample_weight=None):
        self.count += 1
        drawn = self.generator(torch.randn(len(features), 4))
        loss = self.discriminator(drawn.detach()).mean() - self.discriminator(features).mean()
        self.backward(loss, "d")
        self.optimizer_step("d")
        if self.count % self.every == 0:
            self.backward(-self.discriminator(drawn).mean(), "g")
            self.optimizer_step("g")
        return {"loss": loss}


class LowRank(nn.Module):
    """LoRA: a frozen layer, and a trained product of two matrices, one of them zeros."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Linear(inputs, 2, bias=False)
        self.up = nn.Linear(2, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Loop(nn.Module):
    """A layer that is called again and again."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(8, 16)
        self.step = nn.Linear(16, 16)
        self.act = nn.Tanh()
        self.leave = nn.Linear(16, 3)

    def forward(self, x):
        hidden = self.enter(x)
        for _ in range(4):
            hidden = self.act(self.step(hidden))
        return self.leave(hidden)


class LayerDrop(nn.Module):
    """Skips each of its layers in half of the steps (https://arxiv.org/abs/1603.09382)."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(8, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.leave = nn.Linear(16, 3)

    def forward(self, x):
        x = self.enter(x)
        for layer in self.layers:
            if not self.training or torch.rand(()) < 0.5:
                x = x + F.relu(layer(x))
        return self.leave(x)


class Residual(nn.Module):
    """Adds to what dropout has returned, in place."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.1)
        self.block = nn.Linear(3, 3)

    def forward(self, x):
        hidden = self.enter(x)
        outputs = self.dropout(hidden)
        outputs += self.block(hidden)
        return outputs


def compile_heads():
    model = Heads()
    losses = {"kind": nn.CrossEntropyLoss(), "size": nn.MSELoss()}
    model.compile(losses, device="cpu")
    X, y = table()
    return model, (X, {"kind": y, "size": X[:, :1]})


def compile_gan(every):
    model = Gan(every)
    optimizers = {
        "d": torch.optim.Adam(model.discriminator.parameters(), lr=1e-3),
        "g": torch.optim.Adam(model.generator.parameters(), lr=1e-3),
    }
    model.compile(F.mse_loss, optimizers, device="cpu")
    return model, torch.randn(ROWS, 8)


def compile_autoencoder():
    model = minikeras.Model(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2), nn.Linear(2, 8), nn.Sigmoid())
    )
    model.compile(nn.MSELoss(), device="cpu", split_batch=lambda batch: (batch, batch))
    return model, torch.rand(ROWS, 8)


def compile_transfer():
    body = minikeras.freeze(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU()))
    return classify(nn.Sequential(body, nn.Linear(16, 3))), table()


def compile_zero_head():
    net = mlp(nn.ReLU())
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    return classify(net), table()


def compile_trained():
    net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    model = classify(net, torch.optim.Adam(net.parameters(), lr=0.01))
    data = table()
    model.fit(30, data, verbose=0)
    return model, data


def compile_with_teacher():
    net = mlp(nn.ReLU())
    model = classify(net)
    model.teacher = [nn.Linear(8, 3)]  # hidden on purpose: it is not trained
    return model, table()


def compile_warmup():
    net = mlp(nn.ReLU())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    model = classify(net, optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 1000)
    return model, table()


def compile_linear():
    X = torch.randn(ROWS, 3)
    model = minikeras.Model(nn.Linear(3, 1))
    model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), device="cpu")
    return model, (X, X.sum(1, keepdim=True) * 4 + 5)


def convolutional(norm=True):
    layers = []
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1)]
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, 2))


def deep(activation, count, width=32):
    layers = [nn.Linear(8, width), activation()]
    for _ in range(count):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def fast_adam(net):
    return classify(net, torch.optim.AdamW(net.parameters(), lr=0.01))


HEALTHY = {
    "mlp": lambda: (classify(mlp(nn.ReLU(), nn.Dropout(0.5))), table()),
    "mlp, lr=0.01": lambda: (fast_adam(mlp(nn.ReLU())), table()),
    "sgd": lambda: (
        classify(
            net := mlp(nn.ReLU()),
            torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4),
        ),
        table(),
    ),
    "6 layers of ReLU": lambda: (classify(deep(nn.ReLU, 5)), table()),
    "8 layers of tanh": lambda: (classify(deep(nn.Tanh, 7)), table()),
    "2 layers of sigmoid": lambda: (classify(deep(nn.Sigmoid, 1)), table()),
    "cnn": lambda: (fast_adam(convolutional()), images()),
    "cnn without norm": lambda: (classify(convolutional(norm=False)), images()),
    "lstm": lambda: (classify(Recurrent()), tokens()),
    "gru": lambda: (classify(Recurrent(nn.GRU)), tokens()),
    "transformer": lambda: (classify(Attentive()), tokens()),
    "autoencoder": compile_autoencoder,
    "several outputs": compile_heads,
    "gan": lambda: compile_gan(1),
    "gan, generator in every fifth step": lambda: compile_gan(5),
    "bf16": lambda: (classify(mlp(nn.ReLU()), precision="bf16"), table()),
    "clipped": lambda: (classify(mlp(nn.GELU()), clip_grad_norm=0.01), table()),
    "accumulate": lambda: (classify(mlp(nn.ReLU()), accumulate=4), table()),
    "lazy": lambda: (
        classify(nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(3))),
        table(),
    ),
    "called several times": lambda: (classify(Loop()), table()),
    "lora": lambda: (
        classify(nn.Sequential(LowRank(8, 32), nn.ReLU(), LowRank(32, 3))),
        table(),
    ),
    "transfer": compile_transfer,
    "last layer of zeros": compile_zero_head,
    "trained": compile_trained,
    "teacher in a list": compile_with_teacher,
    "warmup": compile_warmup,
    "linear": compile_linear,
    "layers that are skipped by chance": lambda: (classify(LayerDrop()), table()),
    "residual in place": lambda: (classify(Residual()), table()),
    "positions of zeros": lambda: (classify(Positions()), table()),
    "weight norm": lambda: (
        classify(
            nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 3)
            )
        ),
        table(),
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_network_gets_no_warning(name):
    model, data = HEALTHY[name]()
    assert alarms(find(model, data)) == []


# --- planted faults -------------------------------------------------------------------------------


def initialized(net, function):
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            function(module)
    return net


class Functional(nn.Module):
    """Calls the activation as a function, as a method, or through torch.nn.functional."""

    def __init__(self, activate, bias=0.0, scale=1.0):
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.second = nn.Linear(32, 3)
        self.activate = activate
        with torch.no_grad():
            self.first.bias += bias
            self.first.weight *= scale

    def forward(self, x):
        return self.second(self.activate(self.first(x)))


class Cut(nn.Module):
    """The gradient of the first layer is cut off, or is 0."""

    def __init__(self, cut):
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.second = nn.Linear(32, 3)
        self.cut = cut

    def forward(self, x):
        return self.second(self.cut(self.first(x)))


class Listed(minikeras.Model):
    """Keeps its hidden layers in a plain list."""

    def __init__(self):
        super().__init__()
        self.hidden = [nn.Linear(8, 16), nn.Linear(16, 16)]
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.last(x)


class Extra(nn.Module):
    """Has a layer that forward does not call."""

    def __init__(self):
        super().__init__()
        self.used = mlp(nn.ReLU())
        self.forgotten = nn.Linear(8, 3)

    def forward(self, x):
        return self.used(x)


class Matrices(nn.Module):
    """Layers of the user's own, with weights (inputs, units), and learnt positions."""

    def __init__(self, value):
        super().__init__()
        self.first = nn.Parameter(torch.full((8, 16), value))
        self.bias = nn.Parameter(torch.zeros(16))
        self.second = nn.Parameter(torch.full((16, 3), value))

    def forward(self, x):
        return torch.tanh(x @ self.first + self.bias) @ self.second


class Positions(nn.Module):
    """Learnt positions of zeros, whose mean is taken: all of them get the same gradient."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(4, 8))
        self.scale = nn.Parameter(torch.ones(8, 1))
        self.up = nn.ConvTranspose1d(1, 4, 3)
        self.last = nn.LazyLinear(3)

    def forward(self, x):
        x = (x[:, None] + self.positions).mean(1)
        return self.last(self.up(x[:, None] * self.scale.T).flatten(1))


def frozen(net, *layers):
    for number in layers:
        net[number].requires_grad_(False)
    return net


def only_biases(net):
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    return net


def without_first_layer():
    net = mlp(nn.ReLU())
    return classify(net, torch.optim.Adam(net[2].parameters()))


def in_two_optimizers():
    model = Heads()
    optimizers = {
        "all": torch.optim.Adam(model.parameters()),
        "body": torch.optim.Adam(model.body.parameters()),
    }
    model.compile({"kind": nn.CrossEntropyLoss(), "size": nn.MSELoss()}, optimizers, device="cpu")
    return model


def kinds_alone():
    X, y = table()
    return X, {"kind": y}


def with_one_loss():
    model = Heads()
    model.compile({"kind": nn.CrossEntropyLoss()}, device="cpu")
    return model


def with_rate(rate, kind=torch.optim.Adam, net=None):
    net = net or mlp(nn.ReLU())
    return classify(net, kind(net.parameters(), lr=rate))


def constant(value):
    def fill(module):
        nn.init.constant_(module.weight, value)
        nn.init.constant_(module.bias, value)

    return fill


def normal(module):
    nn.init.normal_(module.weight)


def without_bias(module):
    nn.init.zeros_(module.bias)


class SquareRoot(nn.Module):
    """Its gradient is infinite where the features are 0."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.sqrt(self.first(x) * 0))


def logarithm(y_pred, y_true):
    return torch.log(y_pred.mean() - 1000)


def with_loss_of_nan():
    model = minikeras.Model(mlp(nn.ReLU()))
    model.compile(logarithm, device="cpu")
    return model


class AlwaysDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.second = nn.Linear(32, 3)

    def forward(self, x):
        return self.second(F.dropout(F.relu(self.first(x)), 0.3))


def normed(**arguments):
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16, **arguments), nn.ReLU(), nn.Linear(16, 3)
    )


def unsettled():
    net = normed()
    net[1].num_batches_tracked.fill_(100)
    net[1].running_mean.fill_(50.0)
    return classify(net)


# name -> model, data, words of the finding that tells it, level
FAULTS = {
    "last layer frozen": (
        lambda: classify(frozen(mlp(nn.ReLU()), 2)), table, "it is the last layer", "warning"
    ),
    "only biases trained": (
        lambda: classify(only_biases(mlp(nn.ReLU()))), table, "all weights are frozen", "warning"
    ),
    "layer in no optimizer": (without_first_layer, table, "in no optimizer: net.0", "warning"),
    "layers in a list": (
        lambda: classify(Listed()), table, "2 layers are not registered: hidden[0]", "error"
    ),
    "in two optimizers": (
        in_two_optimizers, lambda: compile_heads()[1], "two optimizers: body", "error"
    ),
    "layer not called": (
        lambda: classify(Extra()), table, "does not use 2 of 6 parameters: net.forgotten", "warning"
    ),
    "detached": (
        lambda: classify(Cut(torch.detach)), table, "does not use 2 of 4", "warning"
    ),
    "a head without loss": (
        with_one_loss, kinds_alone, "does not use 2 of 6 parameters: size", "warning"
    ),
    "all weights 0": (
        lambda: classify(initialized(mlp(nn.ReLU()), constant(0.0))), table, "0 for all units",
        "error",
    ),
    "all weights the same": (
        lambda: classify(initialized(mlp(nn.Tanh()), constant(0.1))), table,
        "the same for all units", "error",
    ),
    "own weights of zeros": (
        lambda: classify(Matrices(0.0)), table, "0 for all units", "error"
    ),
    "own weights all the same": (
        lambda: classify(Matrices(0.1)), table, "the same for all units", "error"
    ),
    "convolutions all the same": (
        lambda: classify(initialized(convolutional(False), constant(0.1))), images,
        "the same for all units", "error",
    ),
    "round": (
        lambda: classify(Cut(torch.round)), table, "0 everywhere: net.first", "warning"
    ),
    "softmax of one output": (
        lambda: classify(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 1), nn.Softmax(1),
                                       nn.Linear(1, 3))),
        table, "0 everywhere: net.0, net.1", "warning",
    ),
    "NaN in the gradient": (
        lambda: classify(SquareRoot()), table, "NaN or infinite in", "error"
    ),
    "NaN in the loss": (with_loss_of_nan, table, "nan", "error"),
    "deep sigmoid": (
        lambda: classify(deep(nn.Sigmoid, 9)), table, "vanishes", "warning"
    ),
    "deep sigmoid, SGD": (
        lambda: with_rate(0.1, torch.optim.SGD, deep(nn.Sigmoid, 7)), table, "vanishes", "warning"
    ),
    "deep with large weights": (
        lambda: classify(initialized(deep(nn.ReLU, 8), normal)), table, "in the first layer",
        "warning",
    ),
    "deep without bias": (
        lambda: classify(initialized(deep(nn.ReLU, 24), without_bias)), table,
        "standard deviation from row to row", "warning",
    ),
    "learning rate of 10": (lambda: with_rate(10.0), table, "times their size", "warning"),
    "learning rate of 10, SGD": (
        lambda: with_rate(1e3, torch.optim.SGD), table, "times their size", "warning"
    ),
    "learning rate of 1e-9": (lambda: with_rate(1e-9), table, "of their size", "warning"),
    "learning rate of 1e-8, SGD": (
        lambda: with_rate(1e-8, torch.optim.SGD), table, "of their size", "warning"
    ),
    "dead ReLU": (
        lambda: classify(initialized(mlp(nn.ReLU()), lambda module: module.bias.data.sub_(20))),
        table, "32 of 32 ReLU units", "error",
    ),
    "dead channels": (
        lambda: classify(
            initialized(convolutional(norm=False), lambda module: module.bias.data.sub_(5))
        ),
        images, "ReLU units are 0", "error",
    ),
    "F.relu": (
        lambda: classify(Functional(F.relu, bias=-20)), table, "32 of 32 ReLU units", "error"
    ),
    "torch.relu": (
        lambda: classify(Functional(torch.relu, bias=-20)), table, "32 of 32 ReLU", "error"
    ),
    "x.relu()": (
        lambda: classify(Functional(lambda x: x.relu(), bias=-20)), table, "32 of 32", "error"
    ),
    "saturated tanh": (
        lambda: classify(Functional(torch.tanh, scale=30)), table, "tanh values are saturated",
        "warning",
    ),
    "saturated sigmoid": (
        lambda: classify(
            initialized(mlp(nn.Sigmoid()), lambda module: module.weight.data.mul_(50))
        ),
        table, "sigmoid values are saturated", "warning",
    ),
    "BatchNorm with momentum 0.99": (
        lambda: classify(normed(momentum=0.99)), table, "momentum=0.99", "warning"
    ),
    "BatchNorm with momentum 0.0001": (
        lambda: classify(normed(momentum=1e-4)), table, "hardly move", "warning"
    ),
    "BatchNorm that has not settled": (unsettled, table, "far from those of a batch", "warning"),
    "dropout of 0.95": (
        lambda: classify(mlp(nn.ReLU(), nn.Dropout(0.95))), table, "removes 95%", "warning"
    ),
    "dropout after the last layer": (
        lambda: classify(nn.Sequential(mlp(nn.ReLU()), nn.Dropout(0.3))), table,
        "after the last layer", "warning",
    ),
    "dropout in a row": (
        lambda: classify(mlp(nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.5))), table,
        "2 in a row leave 25%", "warning",
    ),
    "dropout of the features": (
        lambda: classify(nn.Sequential(nn.Dropout(0.6), mlp(nn.ReLU()))), table,
        "60% of the features", "warning",
    ),
    "dropout in eval mode": (
        lambda: classify(AlwaysDropout()), table, "on in eval mode too", "warning"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_little_else_is_told(name):
    make_model, make_data, words, level = FAULTS[name]
    found = alarms(find(make_model(), make_data()))
    told = [finding for finding in found if words in finding.found]
    assert [finding.level for finding in told] == [level], found
    assert len(found) <= 2


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_batch_norm_with_few_rows_is_found(rows):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    (finding,) = alarms(find(classify(net), images(), batch_size=rows))
    assert finding.found == f"batches of {rows} row{'s' * (rows > 1)}"


def test_a_last_batch_of_one_row_is_found_before_fit_raises():
    X, y = table()
    model = classify(normed())
    (finding,) = alarms(find(model, (X[:65], y[:65]), batch_size=32))
    assert finding.level == "error"
    assert "the last batch has 1 row" in finding.found
    with pytest.raises(ValueError, match="cannot train on one row"):
        model.fit(1, (X[:65], y[:65]), batch_size=32, verbose=0)


# --- what is recorded, against plain references ---------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.01}])
def test_a_step_is_that_of_a_bare_training_loop(options):
    X, y = table()
    net = mlp(nn.Tanh())
    model = classify(net, torch.optim.SGD(net.parameters(), lr=0.1), **options)
    step = Evidence(model, [(X, y)], None, 10).step

    loss = F.cross_entropy(net(X), y)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    loss = loss.detach()
    total = torch.stack([gradient.norm() for gradient in gradients]).norm()
    scale = min(1.0, 0.01 / float(total)) if options else 1.0
    assert step.loss == pytest.approx(float(loss), rel=1e-5)
    names = [f"net.{name}" for name, _ in net.named_parameters()]
    expected = dict(zip(names, gradients, strict=True))
    assert [parameter.name for parameter in step.parameters] == list(expected)
    for parameter, weights in zip(step.parameters, net.parameters(), strict=True):
        norm = float(expected[parameter.name].norm()) * scale
        assert parameter.gradient_norm == pytest.approx(norm, rel=1e-3)
        assert parameter.update_norm == pytest.approx(0.1 * norm, rel=1e-3)
        assert parameter.weight_norm == pytest.approx(float(weights.detach().norm()), rel=1e-5)
        assert parameter.update_ratio == pytest.approx(0.1 * parameter.gradient_ratio, rel=1e-3)


def test_layers_are_counted_over_all_rows_whatever_the_batches():
    X, y = table()
    net = Functional(torch.relu, bias=-1.0)
    statistics = {}
    for size in (X.shape[0], 7):
        batches = list(zip(X.split(size), y.split(size), strict=True))
        evidence = Evidence(classify(net), batches, None, 10)
        statistics[size] = [layer for layer in evidence.layers if layer.kind == RELU]
    hidden = torch.relu(net.first(X)).detach()
    dead = int((hidden == 0).all(0).sum())
    assert 0 < dead < 32
    for (layer,) in statistics.values():
        assert layer.name == "net"
        assert layer.dead_units == dead
        assert (layer.units, layer.values) == (32, ROWS)
    (whole,) = statistics[ROWS]
    spread = float(hidden.var(0, correction=0).mean().sqrt())
    assert whole.spread == pytest.approx(spread, rel=1e-4)


def test_a_transformer_shows_its_inner_layers_in_eval_mode_too():
    net = Attentive().eval()
    is_fast = torch.backends.mha.get_fastpath_enabled()
    layers = Evidence(classify(net), tokens(), None, 10).layers
    assert torch.backends.mha.get_fastpath_enabled() == is_fast
    assert "net.encoder.layers.1.linear1" in [layer.name for layer in layers]
    assert [layer.name for layer in layers if layer.kind == RELU] == [
        "net.encoder.layers.0",
        "net.encoder.layers.1",
    ]


def test_watched_and_trained_copies_leave_the_model_as_it_was():
    X, y = table()
    net = mlp(nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5))
    model = classify(net)
    before = copy.deepcopy(net.state_dict())
    evidence = Evidence(model, (X, y), None, 10)
    own = copy.deepcopy(evidence.model.state_dict())
    find(model, (X, y))
    for _ in (evidence.step, evidence.layers):
        assert all(map(torch.equal, own.values(), evidence.model.state_dict().values()))
    assert all(map(torch.equal, before.values(), net.state_dict().values()))
    for module in [*net.modules(), *evidence.model.modules()]:
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not model.optimizer.state
    assert not model.optimizer._optimizer_step_pre_hooks


def test_what_fit_raises_is_raised():
    X, y = table()
    model = classify(mlp(nn.ReLU()))
    with pytest.raises(ValueError, match="class"):
        _ = Evidence(model, [(X, y + 5)], None, 10).step


def test_batches_of_split_batch_keep_the_rows_that_they_state():
    class Sentences(dict):
        batch_size = 2  # sentences, of several words each

    words = Sentences(x=torch.randn(9, 8), y=torch.randint(3, (9,)))
    model = classify(mlp(nn.ReLU()), split_batch=lambda batch: (batch["x"], batch["y"]))
    evidence = Evidence(model, [words], None, 10)
    loss = F.cross_entropy(model(words["x"]), words["y"]).detach()
    assert evidence.step.loss == pytest.approx(float(loss), rel=1e-5)
    assert evidence.train.sizes == [2]


def test_weights_of_rows_are_those_of_the_batch():
    X, y = table()
    weight = torch.rand(ROWS)
    model = minikeras.Model(mlp(nn.ReLU()))
    model.compile(nn.CrossEntropyLoss(reduction="none"), device="cpu")
    loss = (F.cross_entropy(model(X), y, reduction="none") * weight).mean().detach()
    step = Evidence(model, [(X, y, weight)], None, 10).step
    assert step.loss == pytest.approx(float(loss), rel=1e-5)


def test_the_generator_of_a_gan_is_used_if_it_is_trained_in_every_fifth_step():
    model, data = compile_gan(5)
    step = Evidence(model, data, None, 10).step
    optimizers = {
        parameter.name.split(".")[0]: parameter.optimizer for parameter in step.parameters
    }
    assert optimizers == {"generator": "g", "discriminator": "d"}
    assert all(parameter.is_used for parameter in step.parameters)


def test_layers_of_a_gan_are_watched_in_its_own_step():
    model, data = compile_gan(1)
    with torch.no_grad():
        model.discriminator[0].weight.mul_(float("nan"))
        model.generator[0].bias -= 100
    layers = Evidence(model, data, None, 10).layers
    assert next(layer.name for layer in layers if not layer.is_finite) == "discriminator.0"
    assert [layer.dead_units for layer in layers if layer.kind == RELU] == [16]


def test_saturation_of_a_trained_network_is_told_only_if_it_is_nearly_complete():
    data = table()
    for scale, is_told in ((10, False), (300, True)):
        model = classify(Functional(torch.tanh, scale=scale))
        assert alarms(find(model, data))
        model.fit(1, data, verbose=0)
        assert bool(alarms(find(model, data))) == is_told


def test_frozen_layers_of_a_transfer_are_a_note():
    model, data = compile_transfer()
    notes = [finding for finding in find(model, data) if finding.looked_at == "frozen parameters"]
    assert [finding.found for finding in notes] == ["4 of 6: net.0.0, net.0.1"]


def test_layers_that_the_user_keeps_in_eval_mode_are_a_note():
    net = normed()
    net[1].eval()
    (finding,) = find(classify(net), table())
    assert finding.level == "note"
    assert "net.1" in finding.found
