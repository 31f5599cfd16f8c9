"""Programs of torch.export as models: they predict and evaluate, and have no train mode."""

from __future__ import annotations

from torch import fx, nn


def set_mode(module: nn.Module, training: bool) -> None:
    """Put each submodule into train or eval mode, but for an exported program, which refuses: it has one mode."""
    if is_exported(module):
        return
    if not any(is_exported(part) for part in module.modules()):
        module.train(training)
        return
    module.training = training
    for child in module.children():
        set_mode(child, training)


def is_exported(module: nn.Module) -> bool:
    """Whether a module is a program of torch.export, whose `train` and `eval` are errors."""
    if not (isinstance(module, fx.GraphModule) and "train" in vars(module)):
        return False
    try:
        module.train(module.training)
    except NotImplementedError:
        return True
    return False


def check_not_exported(model: nn.Module) -> None:
    """An exported program has no train mode.

    Raises:
        ValueError: a part of the model that is to be trained is one.
    """
    for name, module in model.named_modules():
        if is_exported(module) and any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            raise ValueError(
                f"{name or 'the model'} is a program of torch.export, which has no train mode (dropout and BatchNorm "
                f"are as it was exported). Fit the model that it was exported from; or freeze it, "
                f"{name or 'model'}.requires_grad_(False), and train what comes after it."
            )
