"""What can go wrong during a fit: NaN losses, no memory, dead workers, unreadable rows."""

import gc
import math
import os
import re
import signal
import weakref

import pytest
import torch
from helpers.compare import assert_equal_tensors, copy_weights
from helpers.models import Net, compiled, points
from torch import nn
from torch.utils.data import DataLoader, Dataset

import minikeras
from minikeras import LambdaCallback
from minikeras.faults.loss import FiniteLoss

# --- a loss that is not finite --------------------------------------------------------------------


def bad_at(step, value=math.nan):
    """MSE, multiplied by `value` at one step; `weights` keeps the weights from before it."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = 0

        def forward(self, y_pred, y_true):
            self.count += 1
            return ((y_pred - y_true) ** 2).mean() * (value if self.count == step else 1)

    return Loss()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_loss_is_an_error_before_it_moves_a_weight(value):
    model = compiled(loss_func=bad_at(5, value))
    weights = []
    keep = LambdaCallback(on_batch_end=lambda batch, logs: weights.append(copy_weights(model)))
    with pytest.raises(FloatingPointError) as raised:
        model.fit(2, points(96), batch_size=32, callbacks=[keep], verbose=0)
    last = r"0\.\d+"
    assert str(raised.value).startswith(
        f"the loss is {value} in epoch 2, batch 2; expected a finite number. "
    )
    raised.match(
        rf"The last finite loss was {last}, at lr 0\.1\. Features, labels and weights are finite: "
        r".* The weights are those from before this step\.\nepoch 2$"
    )
    assert_equal_tensors(weights[-1], copy_weights(model))
    assert list(model.history.index) == [0]
    assert all(parameter.grad is None for parameter in model.parameters())


NO_ONE = "There was no finite loss before it in this fit, at lr 0.1. "
FINITE = (
    "Features, labels and weights are finite: lower the learning rate, clip gradients, or check "
    "the loss. "
)
AS_BEFORE = "The weights are those from before this step."


def test_nan_loss_in_the_first_batch_has_no_last_finite_one():
    with pytest.raises(FloatingPointError) as raised:
        compiled(loss_func=bad_at(1)).fit(1, points(8), verbose=0)
    where = "the loss is nan in epoch 1, batch 1; expected a finite number. "
    assert str(raised.value) == where + NO_ONE + FINITE + AS_BEFORE


def test_nan_loss_is_an_error_if_the_optimizer_has_no_lr():
    class Unrated(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    model = Net()
    model.compile(bad_at(1), Unrated(model.parameters(), {}), device="cpu")
    with pytest.raises(FloatingPointError) as raised:
        model.fit(1, points(8), verbose=0)
    where = "the loss is nan in epoch 1, batch 1; expected a finite number. "
    assert (
        str(raised.value)
        == where + NO_ONE.replace("lr 0.1", "an unknown learning rate") + FINITE + AS_BEFORE
    )


IGNORE = {
    "CrossEntropyLoss": (nn.CrossEntropyLoss(ignore_index=0), 0),
    "torch's default": (nn.NLLLoss(), -100),
    "a function": (lambda p, t: nn.functional.cross_entropy(p, t), -100),
    "with penalties": (
        minikeras.Regularized(nn.CrossEntropyLoss(ignore_index=1), nn.Linear(2, 3)),
        1,
    ),
}


@pytest.mark.parametrize(("loss", "ignored"), IGNORE.values(), ids=IGNORE)
def test_nan_loss_of_a_batch_whose_labels_are_all_ignored_is_explained(loss, ignored):
    network = nn.Sequential(nn.Linear(2, 3), nn.LogSoftmax(dim=1))
    model = compiled(minikeras.Model(network), loss)
    before = copy_weights(model)
    with pytest.raises(FloatingPointError) as raised:
        model.fit(1, [(points(8)[0], torch.full((8,), ignored))], verbose=0)
    assert str(raised.value) == (
        f"the loss is nan in epoch 1, batch 1; expected a finite number. {NO_ONE}The loss ignores "
        f"every label of this batch: all are {ignored} (`ignore_index`), and the mean over no "
        f"labels is nan. Let the loss return minikeras.Average(total, count). {AS_BEFORE}"
    )
    assert_equal_tensors(before, copy_weights(model))


@pytest.mark.parametrize("part", ["features", "labels"])
def test_nan_loss_error_says_whether_the_data_held_nan_already(part):
    X, y = points(64)
    (X if part == "features" else y)[40] = math.nan
    model = compiled(loss_func=nn.MSELoss())
    with pytest.raises(FloatingPointError) as raised:
        model.fit(1, list(zip(X.split(32), y.split(32), strict=True)), verbose=0)
    assert f"The {part} of this batch contained NaN or inf: clean the data. The weights are" in str(
        raised.value
    )
    assert "in epoch 1, batch 2;" in str(raised.value)


def test_nan_loss_error_names_a_buffer_that_the_forward_pass_has_spoiled():
    X, y = points(64)
    X[40] = math.nan
    model = minikeras.Model(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)))
    compiled(model, nn.MSELoss())
    with pytest.raises(
        FloatingPointError, match=r"has made net\.0\.running_mean, net\.0\.running_var NaN"
    ):
        model.fit(1, (X, y), verbose=0)


def test_nan_loss_error_names_weights_that_are_nan_already():
    model = compiled(loss_func=nn.MSELoss())
    with torch.no_grad():
        model.fc2.bias.fill_(math.nan)
    with pytest.raises(
        FloatingPointError,
        match=r"Weights are NaN or inf: fc2\.bias\. Restore a checkpoint\.\nepoch 1$",
    ):
        model.fit(1, points(8), verbose=0)


def test_on_nan_stop_ends_the_fit_with_a_warning_and_the_history_so_far():
    model = compiled(loss_func=bad_at(5))
    with pytest.warns(
        UserWarning, match="the loss is nan in epoch 2, batch 2; expected a finite number"
    ):
        dfhistory = model.fit(4, points(96), verbose=0, on_nan="stop")
    assert list(dfhistory.index) == [0]
    assert all(value.isfinite().all() for value in model.parameters())


def test_on_nan_ignore_trains_on():
    model = compiled(loss_func=bad_at(5))
    dfhistory = model.fit(3, points(96), verbose=0, on_nan="ignore")
    assert dfhistory["loss"].isna().tolist() == [False, True, True]


def test_on_nan_must_be_a_known_word():
    with pytest.raises(
        ValueError,
        match=r"on_nan must be 'raise', 'stop' or 'ignore', got 'rais'\. Did you mean 'raise'",
    ):
        compiled().fit(1, points(8), on_nan="rais")


def test_nan_loss_in_a_custom_step_is_an_error_and_outside_a_fit_it_is_not():
    class Own(Net):
        def train_step(self, features, labels):
            loss = self.compute_loss(self(features), labels) * math.inf
            self.backward(loss)
            self.optimizer_step()
            return {"loss": loss}

    model = compiled(Own())
    with pytest.raises(FloatingPointError, match="the loss is inf in epoch 1, batch 1"):
        model.fit(1, points(8), verbose=0)
    model.train_step(*points(8))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:jit. train_step is not one graph")  # of torch 2.11 on CUDA
@pytest.mark.parametrize("options", [{}, {"jit": True}, {"accumulate": 2}], ids=str)
def test_nan_loss_on_a_gpu_lets_the_default_optimizer_take_no_step_from_then_on(options):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model = minikeras.Model(nn.Linear(2, 1))
    kept = []
    model.compile(nn.MSELoss(), **options)
    keep = minikeras.LambdaCallback(
        on_batch_end=lambda batch, logs: kept.append(copy_weights(model))
    )
    X, y = points(100)
    X[44] = math.nan  # batch 5 of 10
    with pytest.raises(
        FloatingPointError,
        match=r"batch 10 \(it started 5 steps before\).*The weights are those from",
    ):
        model.fit(1, list(zip(X.split(10), y.split(10), strict=True)), callbacks=[keep], verbose=0)
    assert_equal_tensors(copy_weights(model), kept[3])


@pytest.mark.parametrize("fused", [True, False])
def test_nan_loss_on_a_device_is_read_every_few_steps_and_holds_back_fused_optimizers(
    fused, monkeypatch
):
    """Played on the CPU, whose fused optimizers skip steps in the same way."""
    monkeypatch.setattr("minikeras.faults.loss.READ_EVERY", 10)
    real = FiniteLoss.__init__

    def as_on_a_device(self, *args):
        real(self, *args)
        self.reads_each = False

    monkeypatch.setattr(FiniteLoss, "__init__", as_on_a_device)
    model = Net()
    weights = []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    model.compile(bad_at(15), optimizer, device="cpu")
    keep = LambdaCallback(on_batch_end=lambda batch, logs: weights.append(copy_weights(model)))
    with pytest.raises(FloatingPointError) as raised:
        model.fit(1, points(64 * 32), callbacks=[keep], verbose=0)
    where = (
        "in epoch 1, batch 30 (it started 15 steps before); expected a finite number. It was at "
        "lr 0.01. "
    )
    assert where in str(raised.value)  # copied at 20, looked at at 30
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in weights[13].items()) == fused
    assert ("The weights are those from before this step" in str(raised.value)) == fused
    assert not hasattr(optimizer, "found_inf")


def test_nan_loss_on_a_device_is_found_at_the_epochs_end_at_the_latest(monkeypatch):
    real = FiniteLoss.__init__

    def as_on_a_device(self, *args):
        real(self, *args)
        self.reads_each = False

    monkeypatch.setattr(FiniteLoss, "__init__", as_on_a_device)
    with pytest.raises(
        FloatingPointError, match=r"in epoch 1, batch 4 \(it started 1 steps before\)"
    ):
        compiled(loss_func=bad_at(3)).fit(2, points(128), verbose=0)


# --- no memory ------------------------------------------------------------------------------------


class Hungry(nn.Module):
    """Takes as much memory as there is nowhere, from a batch of so many rows on."""

    seen = None

    def __init__(self, limit):
        super().__init__()
        self.limit = limit
        self.fc = nn.Linear(2, 1)

    def forward(self, x):
        hidden = self.fc(x)
        Hungry.seen = weakref.ref(hidden)
        if len(x) > self.limit:
            torch.empty(2**60)
        return torch.sigmoid(hidden)


def test_out_of_memory_error_says_what_to_try_and_frees_what_it_held():
    model = compiled(minikeras.Model(Hungry(limit=16)))
    with pytest.raises(RuntimeError, match="can't allocate memory") as raised:
        model.fit(1, points(64), batch_size=32, verbose=0)
    gc.collect()
    assert Hungry.seen() is None  # the activations are gone while the error is still at hand
    assert raised.value.__notes__ == [
        "layer net: Hungry got Tensor (32, 2) float32",
        "The batch was features Tensor (32, 2) float32, labels Tensor (32, 1) float32. Try "
        "batch_size=16, with "
        'accumulate=2 for the same gradient; precision="bf16"; or a smaller model.',
        "dl_train, batch 1",
        "epoch 1",
    ]
    assert len(model.fit(1, points(64), batch_size=16, verbose=0)) == 1


# --- reading --------------------------------------------------------------------------------------


class Broken(Dataset):
    """Row 37 cannot be read, or kills whoever reads it."""

    def __init__(self, deadly=False):
        self.deadly = deadly
        self.X, self.y = points(64)

    def __len__(self):
        return 64

    def __getitem__(self, row):
        if row == 37:
            if self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("no such picture")
        return self.X[row], self.y[row]


def test_dataset_row_that_cannot_be_read_is_named_with_its_batch_and_epoch():
    with pytest.raises(OSError, match="no such picture") as raised:
        compiled().fit(1, DataLoader(Broken(), batch_size=16), verbose=0)
    assert raised.value.__notes__ == [
        "row 37 of the dataset",
        "dl_train, batch 3, as it was read",
        "epoch 1",
    ]


def test_dataset_row_that_a_worker_cannot_read_is_named_by_its_batch():
    with pytest.raises(OSError, match="no such picture") as raised:
        compiled().fit(1, DataLoader(Broken(), batch_size=16, num_workers=1), verbose=0)
    assert raised.value.__notes__ == [
        "It was raised in a worker process: pass num_workers=0 to see which row it was.",
        "dl_train, batch 3, as it was read",
        "epoch 1",
    ]


def test_worker_that_dies_raises_an_error_with_a_hint_on_memory_and_the_last_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    loader = DataLoader(Broken(deadly=True), batch_size=16, num_workers=1, prefetch_factor=1)
    with pytest.raises(RuntimeError, match="DataLoader worker") as raised:
        compiled().fit(1, loader, verbose=0, checkpoint=path, checkpoint_every=1)
    hint, batch, epoch, *saved = raised.value.__notes__
    assert hint == (
        "A DataLoader worker process has died, usually because memory or shared memory (/dev/shm) "
        "ran out. Try fewer workers or "
        'smaller batches, or torch.multiprocessing.set_sharing_strategy("file_system").'
    )
    # it dies ahead of its turn
    read = re.fullmatch(r"dl_train, batch ([123])(, as it was read)?", batch)
    assert epoch == "epoch 1"
    if saved:
        step = int(read[1]) - (read[2] is not None)
        known = [
            f"The last checkpoint is in {path}: epoch 1, step {s}. Call fit again to resume from "
            "there."
            for s in (step, step - 1)
        ]
        assert saved[0] in known
    else:
        assert read[1] == "1"


def test_batchnorm_with_a_last_batch_of_one_row_raises_an_error_with_a_remedy():
    model = compiled(
        minikeras.Model(
            nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Sigmoid())
        )
    )
    with pytest.raises(ValueError, match="one row") as raised:
        model.fit(1, points(33), verbose=0)
    assert str(raised.value) == (
        "layer net.1 (BatchNorm1d) cannot train on one row, which has no variance: it got shape "
        "(1, 4). Drop the short last batch with drop_last=True, or choose another batch_size."
    )
    assert raised.value.__notes__ == ["dl_train, batch 2", "epoch 1"]


def test_generator_that_is_exhausted_raises_an_error_with_its_epoch():
    with pytest.raises(ValueError, match=r"^dl_train gave no batch: it is a generator") as raised:
        compiled().fit(1, (batch for batch in ()), verbose=0)
    assert raised.value.__notes__ == ["dl_train, batch 0", "epoch 1"]
