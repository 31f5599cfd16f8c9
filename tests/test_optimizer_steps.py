"""model.optimizer_steps: how many steps the optimizers have taken in a fit."""

import pytest
import torch
from helpers.models import compiled, points
from torch import nn

import minikeras
from minikeras import EMA, LambdaCallback

X, y = points(40)


class Rare(minikeras.Model):
    """A custom step that moves the weights after every second batch, by torch's own calls."""

    def train_step(self, features, labels, sample_weight=None):
        loss = self.compute_loss(self.compute_outputs(features), labels)
        loss.backward()
        self.batches = getattr(self, "batches", 0) + 1
        if self.batches % 2 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"loss": loss}


def rare():
    model = Rare(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.compile(nn.BCEWithLogitsLoss(), optimizer, device="cpu")
    return model


def test_optimizer_steps_are_0_before_compile():
    assert minikeras.Model(nn.Linear(2, 1)).optimizer_steps == 0


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 8), (3, 4)])  # 4 batches an epoch
def test_optimizer_steps_are_batches_or_windows_and_begin_anew_with_each_fit(accumulate, steps):
    model = compiled(accumulate=accumulate)
    for _ in range(2):
        model.fit(2, (X, y), batch_size=10, verbose=0)
        assert model.optimizer_steps == steps


def test_optimizer_steps_have_the_names_of_several_optimizers():
    class Alternating(minikeras.Model):
        def train_step(self, features, labels, sample_weight=None):
            loss = self.compute_loss(self.compute_outputs(features), labels)
            self.backward(loss)
            self.optimizer_step("weight")
            if self.optimizer_steps["weight"] % 4 == 0:
                self.optimizer_step("bias")
            return {"loss": loss}

    net = nn.Linear(2, 1)
    model = Alternating(net)
    optimizers = {
        "weight": torch.optim.SGD([net.weight], lr=0.1),
        "bias": torch.optim.SGD([net.bias], lr=0.1),
    }
    model.compile(nn.BCEWithLogitsLoss(), optimizers, device="cpu")
    model.fit(2, (X, y), batch_size=10, verbose=0)
    assert model.optimizer_steps == {"weight": 8, "bias": 2}


def test_optimizer_steps_count_those_that_a_custom_step_takes_by_itself():
    model = rare()
    model.fit(2, (X, y), batch_size=10, verbose=0)
    assert model.optimizer_steps == 4


def test_optimizer_steps_of_a_closure_count_once():
    class Closure(minikeras.Model):
        def train_step(self, features, labels, sample_weight=None):
            def closure():
                self.optimizer.zero_grad()
                loss = self.compute_loss(self.compute_outputs(features), labels)
                loss.backward()
                return loss

            return {"loss": self.optimizer.step(closure)}

    model = Closure(nn.Linear(2, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    model.compile(nn.BCEWithLogitsLoss(), optimizer, device="cpu")
    model.fit(1, (X, y), batch_size=10, verbose=0)
    assert model.optimizer_steps == 4


def test_optimizer_steps_of_a_graph_are_seen_by_callbacks_after_each_call():
    seen = []
    model = compiled(jit={"backend": "eager"}, steps_per_execution=3)
    note = LambdaCallback(on_batch_end=lambda batch, logs: seen.append(model.optimizer_steps))
    model.fit(1, (X, y), batch_size=5, callbacks=[note], verbose=0)  # the first batch is eager
    assert seen == [1, 4, 7, 8]


def test_optimizer_steps_go_on_where_a_resumed_fit_stood(tmp_path):
    class Stop(minikeras.Callback):
        def on_batch_end(self, batch, logs):
            if self.model.optimizer_steps == 6:
                raise KeyboardInterrupt

    options = {"batch_size": 10, "verbose": 0, "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(KeyboardInterrupt):
        compiled().fit(3, (X, y), callbacks=[Stop()], checkpoint_every=1, **options)
    seen = []
    model = compiled()
    note = LambdaCallback(on_batch_end=lambda batch, logs: seen.append(model.optimizer_steps))
    model.fit(3, (X, y), callbacks=[note], **options)
    assert seen == list(range(6, 13))  # the file was written after step 5


def test_ema_follows_the_steps_of_a_custom_step_and_not_its_batches():
    torch.manual_seed(0)
    model = rare()
    ema = EMA(0.5)
    weights = []
    note = LambdaCallback(on_batch_end=lambda *_: weights.append(model.net.weight.detach().clone()))
    model.fit(1, (X, y), batch_size=10, callbacks=[note, ema], verbose=0)  # steps in batches 2, 4
    assert torch.equal(ema.averaged[0], weights[1].lerp(weights[3], 0.5))
