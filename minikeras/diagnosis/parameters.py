"""Checks of the parameters: frozen, unused, in which optimizer, symmetric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import Evidence, copy_leaf
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.gradients import join_words
from minikeras.diagnosis.layers import (
    LAYER,
    STEPS,
    ParameterStep,
    Step,
    find_unit_axis,
    find_unregistered,
    named_parameters,
)
from minikeras.modes import TrainingModes
from minikeras.nests import leaves, map_leaves
from minikeras.run import has_own_step
from minikeras.stepper import optimizer_parameters


def check_frozen(evidence: Evidence) -> Iterator[Finding]:
    """Find frozen parameters."""
    named = named_parameters(evidence.model, evidence.loss_func)
    frozen = {name: value for name, value in named.items() if not value.requires_grad}
    trained = {name: value for name, value in named.items() if value.requires_grad}
    if not frozen or not trained:
        return  # if nothing is trained, the training step raises an error
    remedy = (
        "minikeras.unfreeze(layer) trains a layer; compile again if the optimizer does not have "
        "its parameters."
    )
    if any(value.ndim > 1 for value in frozen.values()) and not any(
        value.ndim > 1 for value in trained.values()
    ):
        yield Finding(
            "warning",
            "frozen parameters",
            f"all weights are frozen; only {join_words(list(trained))} "
            f"{'is' if len(trained) == 1 else 'are'} trained",
            "weights are trained",
            f"Biases and norm layers alone learn little. {remedy}",
        )
        return
    last = find_last_layer(evidence)
    if last is not None and is_frozen_by_mistake(evidence, last):
        yield Finding(
            "warning",
            f"layer {last}",
            "frozen, and it is the last layer",
            "the last layer is trained",
            f"With transfer learning the first layers are frozen, and the last one learns. "
            f"{remedy}",
        )
        return
    yield Finding(
        "note",
        "frozen parameters",
        f"{len(frozen)} of {len(named)}: {join_words(layers_of(list(frozen)))}",
        "as you chose",
        "They do not learn. minikeras.unfreeze(layer) trains them again.",
    )


def find_last_layer(evidence: Evidence) -> str | None:
    """Return the name of the last layer with weights that forward calls."""
    last = None
    for layer in evidence.layers:
        if layer.kind == LAYER and layer.has_weights and layer.name:
            last = layer.name
    return last


def is_frozen_by_mistake(evidence: Evidence, name: str) -> bool:
    """Tell whether the last layer is frozen, and neither adapted nor that of another network.

    It is adapted if what it is a part of trains something else, or if trained parameters were put
    into frozen layers before it, as in LoRA (https://arxiv.org/abs/2106.09685) and prompt tuning.
    It is that of another network, such as a teacher, if no trained layer comes before it.
    """
    model = evidence.model
    layer = model.get_submodule(name)
    if any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
        return False
    parent = model.get_submodule(name.rpartition(".")[0])
    is_alone = isinstance(parent, nn.Sequential) or parent is model
    if not is_alone and any(parameter.requires_grad for parameter in parent.parameters()):
        return False
    return gets_a_gradient(evidence, name) and not has_adapters(model, name)


def gets_a_gradient(evidence: Evidence, name: str) -> bool:
    """Tell whether trained layers come before a frozen one: what it is given has a gradient."""
    found: list[bool] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        for leaf in leaves((args, kwargs), inside=True):
            found.append(isinstance(leaf, Tensor) and leaf.requires_grad)

    model = evidence.copy_model()
    TrainingModes(model).enter()  # a student may call its teacher in train mode only
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.enable_grad(), silenced():
            model.compute_outputs(map_leaves(copy_leaf, evidence.train.batches[0][0]))
    except Exception:  # a custom step may call submodules with the features
        return True
    finally:
        handle.remove()
    return any(found) or not found


def has_adapters(model: nn.Module, last: str) -> bool:
    """Tell whether trained parameters were put between frozen layers, before the last one.

    They are in no layer, such as a prompt; or in a layer next to frozen ones, in a part of the
    model that the last layer is not a part of.
    """
    are_in_layers = False
    for name, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
        if not any(parameter.requires_grad for parameter in own):
            continue
        are_in_layers = are_in_layers or not any(True for _ in module.children())
        parent_name = name.rpartition(".")[0]
        parent = model.get_submodule(parent_name)
        if isinstance(parent, nn.Sequential) or f"{last}.".startswith(f"{parent_name}."):
            continue
        if parent_name and has_frozen_weights(parent):
            return True
    return not are_in_layers


def has_frozen_weights(module: nn.Module) -> bool:
    """Tell whether a weight of a module is frozen."""
    return any(
        parameter.ndim > 1 and not parameter.requires_grad for parameter in module.parameters()
    )


def layers_of(names: list[str]) -> list[str]:
    """Return the layers that parameters belong to, each once.

    >>> layers_of(["net.0.weight", "net.0.bias", "scale"])
    ['net.0', 'scale']
    """
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def check_optimizers(evidence: Evidence) -> Iterator[Finding]:
    """Find parameters that are in no optimizer, or in two."""
    yield from find_unregistered_modules(evidence)
    named = named_parameters(evidence.model, evidence.loss_func)
    optimizers_of: Counter[int] = Counter()
    for optimizer in evidence.optimizers.values():
        optimizers_of.update({id(parameter) for parameter in optimizer_parameters(optimizer)})
    scripted = find_scripted(evidence.model)
    missing = []
    twice = []
    for name, parameter in named.items():
        if not parameter.requires_grad or id(parameter) in scripted:
            continue
        if not optimizers_of[id(parameter)]:
            missing.append(name)
        elif optimizers_of[id(parameter)] > 1:
            twice.append(name)
    if missing:
        yield Finding(
            "warning",
            f"layer {layers_of(missing)[0]}" if len(layers_of(missing)) == 1 else "optimizer",
            f"{len(missing)} of {len(named)} parameters are in no optimizer: "
            f"{join_words(layers_of(missing))}",
            "all are in one",
            "They are not trained. Make the optimizer with all of them, "
            "torch.optim.Adam(model.parameters()), after the last layer was added, and compile "
            "again; or freeze them with minikeras.freeze(layer).",
        )
    if twice and not has_own_step(evidence.model):
        yield Finding(
            "error",
            "optimizers",
            f"{len(twice)} parameters are in two optimizers: {join_words(layers_of(twice))}",
            "each in one",
            "Both optimizers move them in each step. Give each optimizer the parameters of its "
            "own part of the model.",
        )


def find_scripted(model: nn.Module) -> set[int]:
    """Return the ids of parameters in modules of torch.jit, whose copies no optimizer knows."""
    ids = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            ids |= {id(parameter) for parameter in module.parameters()}
    return ids


def find_unregistered_modules(evidence: Evidence) -> Iterator[Finding]:
    """Find layers in plain lists and dicts, which the model does not know."""
    names = list(find_unregistered(evidence.model))
    if not names:
        return
    step = find_step(evidence)
    if step is not None:  # a frozen teacher may be hidden in a list on purpose
        names = step.unregistered
    if not names:
        return
    kind = "dict" if "['" in names[0] else "list"
    container = "nn.ModuleDict" if kind == "dict" else "nn.ModuleList"
    yield Finding(
        "error",
        f"layers in a {kind}",
        f"{len(names)} layers are not registered: {join_words(names)}",
        f"in an {container}",
        f"model.parameters() does not have their weights: they are not trained, saved or moved to "
        f"the device. Write {container}(...) instead of a plain {kind}, and make the optimizer "
        "after that.",
    )


def find_step(evidence: Evidence) -> Step | None:
    """Return the training step; None if it raises an error, which is a finding of its own."""
    try:
        return evidence.step
    except Exception:
        return None


def check_unused(evidence: Evidence) -> Iterator[Finding]:
    """Find parameters that the loss does not use."""
    step = find_step(evidence)
    if step is None:
        return
    in_optimizers: set[str] = set()
    ids = set()
    for optimizer in evidence.optimizers.values():
        ids |= {id(parameter) for parameter in optimizer_parameters(optimizer)}
    for name, parameter in named_parameters(evidence.model, evidence.loss_func).items():
        if id(parameter) in ids:
            in_optimizers.add(name)
    unused = []
    for parameter_step in step.parameters:
        # those in no optimizer have a line already
        if not parameter_step.is_used and parameter_step.name in in_optimizers:
            unused.append(parameter_step.name)
    if not unused:
        return
    layers = layers_of(unused)
    called = {}
    for layer in evidence.layers:
        called[layer.name] = layer.is_output
    if any(called.get(name, False) for name in layers):
        remedy = (
            "Their output is an output of the model that no loss uses. Give compile a loss for "
            "it, such as a dict of losses, or leave the layers out."
        )
    elif any(name in called for name in layers):
        remedy = (
            "The model calls them, and the gradient does not reach them. Look between them and the "
            "loss for .detach(), .data, .item(), .numpy(), torch.no_grad(), torch.tensor(outputs) "
            "or argmax, and for outputs that are not used."
        )
    else:
        remedy = "The model does not call them. Call them in forward, or delete them."
    yield Finding(
        "warning",
        f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers",
        f"the loss does not use {len(unused)} of {len(step.parameters)} parameters: "
        f"{join_words(layers)}",
        "all are used",
        f"They are not trained. {remedy}",
    )


def check_symmetry(evidence: Evidence) -> Iterator[Finding]:
    """Find layers whose units all begin with the same weights.

    It is a fault if they stay the same in training: a last layer of zeros, or a LoRA matrix of
    zeros, gets another gradient in each row.
    """
    step = find_step(evidence)
    if step is None:
        return
    modules = dict(evidence.model.named_modules())
    alike = []
    begun = []
    for parameter in step.parameters:
        if parameter.stays_alike:
            alike.append(parameter)
        elif parameter.begins_alike and find_unit_axis(modules.get(parameter.layer)) is not None:
            begun.append(parameter)
    if alike:
        yield explain_symmetry(alike)
    elif begun:
        names = layers_of([parameter.name for parameter in begun])
        yield Finding(
            "note",
            f"initial weights of {join_words(names)}",
            "the same for all units; they differ after the first steps",
            "random",
            "A last layer of zeros is usual. For other layers use PyTorch's initialization.",
        )


def explain_symmetry(alike: list[ParameterStep]) -> Finding:
    """Return the finding for layers whose units stay the same."""
    names = layers_of([parameter.name for parameter in alike])
    values = "0" if not any(parameter.weight_norm for parameter in alike) else "the same"
    return Finding(
        "error",
        f"initial weights of {join_words(names)}",
        f"{values} for all units, also after {STEPS} steps",
        "random",
        "All units of such a layer compute the same and learn the same, as if there were one. "
        "Use PyTorch's initialization, or nn.init.kaiming_normal_(layer.weight).",
    )
