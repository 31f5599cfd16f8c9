"""Wrong arguments of Model and compile."""

import pytest
import torch
from helpers.bad_input import cases, refused
from helpers.metrics import mse
from torch import nn
from torchmetrics.classification import MulticlassF1Score

from minikeras import Model, OnAllRows

NETS = {"a class": nn.Linear, "layers": [nn.Linear(4, 1), nn.ReLU()], "a function": mse}
NETS_SAY = """
a class | TypeError: Model wraps a torch.nn.Module, got the class Linear. Pass an instance,
    Linear(...).
layers | TypeError: Model wraps a torch.nn.Module, got [Linear, ReLU]. Pass nn.Sequential(*layers),
    or subclass Model and write its forward.
a function | TypeError: Model wraps a torch.nn.Module, got function. Pass nn.Sequential(*layers), or
    subclass Model and write its forward.
"""


@pytest.mark.parametrize(("net", "message"), cases(NETS, NETS_SAY))
def test_model_wraps_a_module_and_nothing_else(net, message):
    with refused(message):
        Model(net)


class Forgetful(nn.Module):
    def __init__(self):
        self.margin = 1

    def forward(self, p, t):
        return (p - t).mean()


COMPILE = {
    "a loss class": {"loss_func": nn.MSELoss},
    "a loss by name": {"loss_func": "mse"},
    "a loss without super": {"loss_func": Forgetful()},
    "a metric without super": {"metrics_dict": {"m": Forgetful()}},
    "a metric class": {"metrics_dict": {"m": nn.L1Loss}},
    "a class with arguments": {"metrics_dict": {"m": MulticlassF1Score}},
    "OnAllRows": {"metrics_dict": {"m": OnAllRows}},
    "a list of metrics": {"metrics_dict": [mse]},
    "a metric named 3": {"metrics_dict": {3: mse}},
    "a metric named loss": {"metrics_dict": {"loss": mse}},
    "a metric named val_x": {"metrics_dict": {"val_x": mse}},
    "an optimizer class": {"optimizer": torch.optim.Adam},
    "an optimizer by name": {"optimizer": "adam"},
    "a class in a dict": {"optimizer": {"d": torch.optim.Adam}},
    "no optimizers": {"optimizer": {}},
}
COMPILE_SAYS = """
a loss class | TypeError: loss_func is the class MSELoss; expected an instance. Pass MSELoss().
a loss by name | TypeError: loss_func must be a function of (y_pred, y_true) or a module, got 'mse'.
    Strings are not accepted: pass for instance nn.MSELoss(); the optimizer comes second,
    torch.optim.Adam(model.parameters(), lr=1e-3).
a loss without super | TypeError: loss_func is a Forgetful whose __init__ did not call
    super().__init__(). Call it there, before anything else.
a metric without super | TypeError: metric 'm' is a Forgetful whose __init__ did not call
    super().__init__(). Call it there, before anything else.
a metric class | TypeError: metric 'm' is the class L1Loss; expected an instance. Pass L1Loss().
a class with arguments | TypeError: metric 'm' is the class MulticlassF1Score; expected an instance.
    Pass MulticlassF1Score(num_classes=...).
OnAllRows | TypeError: metric 'm' is the class OnAllRows; expected an instance. Pass
    OnAllRows(function=...).
a list of metrics | TypeError: metrics_dict must be a dict of name -> metric, got list. Pass for
    instance {"accuracy": minikeras.accuracy}.
a metric named 3 | TypeError: metrics_dict has the name 3; expected a string.
a metric named loss | ValueError: metrics_dict has the name 'loss', which history uses itself (loss,
    lr, epoch and val_...). Give it another name.
a metric named val_x | ValueError: metrics_dict has the name 'val_x', which history uses itself
    (loss, lr, epoch and val_...). Give it another name.
an optimizer class | TypeError: optimizer must be a torch.optim.Optimizer or a dict of them, got the
    class Adam. Pass for instance torch.optim.Adam(model.parameters(), lr=1e-3).
an optimizer by name | TypeError: optimizer must be a torch.optim.Optimizer or a dict of them, got
    'adam'. Pass for instance torch.optim.Adam(model.parameters(), lr=1e-3).
a class in a dict | TypeError: optimizer 'd' must be a torch.optim.Optimizer or a dict of them, got
    the class Adam. Pass for instance torch.optim.Adam(model.parameters(), lr=1e-3).
no optimizers | ValueError: optimizer is an empty dict; expected at least one. Omit it to use
    Adam(lr=1e-3).
"""


@pytest.mark.parametrize(("arguments", "message"), cases(COMPILE, COMPILE_SAYS))
def test_compile_refuses_what_it_cannot_use(arguments, message):
    model = Model(nn.Linear(4, 1))
    with refused(message, model):
        model.compile(**{"loss_func": nn.MSELoss(), **arguments})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the message names what is there")
@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:0"])
def test_compile_with_a_missing_device_raises_an_error_with_those_that_exist(device):
    with refused(f"ValueError: device {device!r} is not there; expected one of cpu."):
        Model(nn.Linear(4, 1)).compile(nn.MSELoss(), device=device)
