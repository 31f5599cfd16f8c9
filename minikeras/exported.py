"""Models that are programs of torch.export: they predict and evaluate, but cannot be trained.

You may skip this file at a first reading.
"""

from __future__ import annotations

from torch import fx, nn


def set_mode(module: nn.Module, training: bool) -> None:
    """Put each submodule into train or eval mode, except exported programs, which have one mode."""
    if is_exported(module):
        return
    if not any(is_exported(part) for part in module.modules()):
        module.train(training)
        return
    module.training = training
    for child in module.children():
        set_mode(child, training)


def is_exported(module: nn.Module) -> bool:
    """Tell whether a module is a program of torch.export, whose `train` and `eval` raise errors."""
    if not (isinstance(module, fx.GraphModule) and "train" in vars(module)):
        return False
    try:
        module.train(module.training)
    except NotImplementedError:
        return True
    return False


def check_not_exported(model: nn.Module) -> None:
    """Refuse to train an exported program, which has no train mode.

    Raises:
        ValueError: a part of the model with trainable parameters is an exported program.
    """
    for name, module in model.named_modules():
        if not is_exported(module):
            continue
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(
                f"{name or 'the model'} is a program of torch.export, which has no train mode "
                f"(dropout and BatchNorm are as it was exported). Fit the model that it was "
                f"exported from; or freeze it, {name or 'model'}.requires_grad_(False), and train "
                f"what comes after it."
            )
