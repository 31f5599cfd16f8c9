"""Freeze a part of a model for transfer learning, and train it again."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minikeras.errors import describe
from minikeras.modes import leave_eval, stay_in_eval

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Stop training a module: no gradients, and eval mode in every fit until `unfreeze`.

    No optimizer moves its weights, even one with momentum or weight decay that trained them
    before. BatchNorm's running statistics stand still, and dropout is off, also after
    `model.train()` of the `minikeras.Model` that has the module in it. An optimizer may hold frozen
    parameters: it skips them. The exception is LBFGS, whose steps use earlier gradients: make a new
    one after freezing.

    Args:
        module: a layer or a whole network, such as `model.net[0]`. Freezing it twice is the same
            as once.

    Returns:
        The module itself.

    Raises:
        TypeError: not a module, such as a list of parameters.

    >>> import minikeras, torch
    >>> body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    >>> model = minikeras.Model(nn.Sequential(minikeras.freeze(body), nn.Linear(4, 1)))
    >>> model.compile(nn.MSELoss(), torch.optim.Adam(model.parameters(), weight_decay=0.1))
    >>> before = [value.clone() for value in body.state_dict().values()]
    >>> dfhistory = model.fit(1, (torch.ones(8, 2), torch.ones(8, 1)), verbose=0)
    >>> all(map(torch.equal, before, body.state_dict().values()))
    True
    """
    check_module(module, "freeze")
    for parameter in module.parameters():
        parameter.requires_grad = False  # a lazy parameter refuses requires_grad_
        parameter.grad = None  # else the next step would still move it
    stay_in_eval(module)
    return module


def unfreeze(module: Module) -> Module:
    """Train a module again: gradients for all its parameters, and train mode in fits.

    It is the reverse of `freeze`, for the frozen module or for a part of it, such as its last
    block. The optimizer must hold the parameters to train them: an optimizer that was made from
    other parameters alone does not, and `fit` raises an error then.

    Args:
        module: a module. One that was not frozen is put into train mode as well.

    Returns:
        The module itself.

    Raises:
        TypeError: not a module, such as a list of parameters.

    >>> net = freeze(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)))
    >>> unfreeze(net[2])
    Linear(in_features=4, out_features=1, bias=True)
    >>> [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    ['2.weight', '2.bias']
    """
    check_module(module, "unfreeze")
    for parameter in module.parameters():
        if is_lazy(parameter) or parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad = True  # integers, as of a quantized layer, have no gradient
    leave_eval(module)
    return module


def check_module(module: object, verb: str) -> None:
    """Refuse what is not a module.

    Raises:
        TypeError: it is none.
    """
    if isinstance(module, nn.Module):
        return
    got = describe(module)
    remedy = f"Pass the layer or the network itself, as {verb}(model.net[0])."
    if isinstance(module, type):
        got = f"the class {module.__name__}"
        remedy = f"Pass an instance, as {verb}({module.__name__}(...))."
    elif isinstance(module, Tensor):
        remedy = (
            f"Pass the layer that has it; for one parameter alone, "
            f"parameter.requires_grad_({verb == 'unfreeze'}) does it."
        )
    elif callable(getattr(module, "__iter__", None)) and not isinstance(module, (str, bytes)):
        remedy = (
            f"Pass the module, not its parameters: {verb}(model.net[0]). For several modules call "
            f"it once for each."
        )
    raise TypeError(f"{verb} expects `module`, a torch.nn.Module, got {got}. {remedy}")
