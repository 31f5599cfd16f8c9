"""Checks of train mode against eval mode: BatchNorm and dropout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import Evidence, copy_leaf
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.gradients import join_words
from minikeras.diagnosis.kinds import BATCH_NORMS
from minikeras.diagnosis.layers import DROPOUT, LAYER, LayerStatistics
from minikeras.modes import TrainingModes
from minikeras.nests import map_leaves

FEW_ROWS = 4  # https://arxiv.org/abs/1803.08494, figure 1: with 4 rows the error begins to rise
# PyTorch's default is 0.1, and 0.01 is usual too. Keras counts the other way: its 0.99 is 0.01.
LARGEST_MOMENTUM = 0.9
SMALLEST_MOMENTUM = 0.005
STEPS_TO_SETTLE = 50  # 0.9 ** 50 is 0.005: what is left of the initial statistics
VALUES = 16  # of a channel in a batch, at least, to compare with the running statistics
FAR_MEAN = 3.0  # standard deviations, the median over channels
FAR_VARIANCE = 10.0  # times as large or as small, the median over channels

HIGH_DROPOUT = 0.7  # 0.5 is the largest usual one
SMALLEST_SHARE = 0.3  # that several dropouts in a row leave
INPUT_DROPOUT = 0.5  # 0.2 is usual: https://jmlr.org/papers/v15/srivastava14a.html


def check_batch_norm(evidence: Evidence) -> Iterator[Finding]:
    """Find BatchNorm with tiny batches, or whose running statistics do not settle."""
    model = evidence.copy_model()
    modes = TrainingModes(model)
    modes.enter()
    for line in modes.describe():
        if not line.startswith("frozen"):
            yield Finding(
                "note",
                "train and eval mode",
                line,
                "as you chose",
                "These layers do not use dropout, and BatchNorm there does not move. "
                "minikeras.unfreeze(layer) puts them into train mode.",
            )
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module.training:
            layers[name] = module
    if not layers:
        return
    yield from find_small_batches(evidence, model, list(layers))
    yield from find_bad_momentum(layers)
    yield from find_unsettled(evidence, model, layers)


def find_small_batches(evidence: Evidence, model: Any, names: list[str]) -> Iterator[Finding]:
    """Find batches, or a last batch, with too few rows for BatchNorm."""
    sample = evidence.train
    which = f"BatchNorm {join_words(names)}"
    if sample.batch_size <= FEW_ROWS:
        rows = "1 row" if sample.batch_size == 1 else f"{sample.batch_size} rows"
        yield Finding(
            "warning",
            which,
            f"batches of {rows}",
            "16 or more",
            "Mean and variance of so few rows are noise, and eval mode uses others. Use larger "
            "batches, or nn.GroupNorm or nn.LayerNorm, which do not depend on the batch; "
            "compile(accumulate=...) does not help.",
        )
        return
    if sample.is_whole and sample.sizes[-1] == 1:
        # torch raises an error only if there is one value per channel, not for an image
        if can_call(model, sample.batches[0][0]) and not can_call(model, sample.batches[-1][0]):
            yield Finding(
                "error",
                which,
                "the last batch has 1 row, and fit raises an error there",
                "2 or more",
                "Pass drop_last=True to the DataLoader, or another batch_size.",
            )


def can_call(model: Any, features: Any) -> bool:
    """Call a model; tell whether it has raised no error."""
    try:
        with torch.no_grad(), silenced():
            model.compute_outputs(map_leaves(copy_leaf, features))
    except Exception:
        return False
    return True


def find_bad_momentum(layers: dict[str, Any]) -> Iterator[Finding]:
    """Find a momentum with which the running statistics follow each batch, or none."""
    fast = []
    slow = []
    for name, module in layers.items():
        if not module.track_running_stats or module.momentum is None:
            continue
        if module.momentum >= LARGEST_MOMENTUM:
            fast.append(name)
        elif module.momentum < SMALLEST_MOMENTUM:
            slow.append(name)
    for names, found, effect in (
        (fast, "the running statistics are those of the last batch", "depends on that batch"),
        (slow, "the running statistics hardly move", "uses the initial mean 0 and variance 1"),
    ):
        if not names:
            continue
        yield Finding(
            "warning",
            f"BatchNorm {join_words(names)}",
            f"momentum={layers[names[0]].momentum:g}: {found}",
            "0.01 to 0.1",
            f"Eval mode {effect}. In PyTorch momentum is the weight of the new batch (Keras's is "
            "1 - momentum): leave it at 0.1.",
        )


def find_unsettled(evidence: Evidence, model: Any, layers: dict[str, Any]) -> Iterator[Finding]:
    """Find running statistics that are far from those of a batch, although there were many."""
    inputs: dict[str, Tensor] = {}
    handles = []
    running = {}
    for name, module in layers.items():
        seen = module.num_batches_tracked
        if seen is None or int(seen) < STEPS_TO_SETTLE or module.running_mean is None:
            continue
        running[name] = module.running_mean.clone(), module.running_var.clone()

        def keep(_: Any, args: Any, name: str = name) -> None:
            inputs.setdefault(name, args[0].detach())

        handles.append(module.register_forward_pre_hook(keep))
    if not running:
        return
    can_call(model, evidence.train.batches[0][0])
    for handle in handles:
        handle.remove()
    far = []
    for name, values in inputs.items():
        if is_far(values, *running[name]):
            far.append(name)
    if far:
        yield Finding(
            "warning",
            f"BatchNorm {join_words(far)}",
            "the running mean and variance are far from those of a batch",
            "about the same",
            "Eval mode uses the running ones, so validation differs from training. Train with a "
            "lower learning rate or larger batches, and look whether the features are scaled as "
            "they were.",
        )


def is_far(values: Tensor, mean: Tensor, variance: Tensor) -> bool:
    """Tell whether statistics are far from those of a batch, in the median over the channels.

    Args:
        values: (rows, channels, ...), what a BatchNorm was given.
        mean, variance: (channels,), the running ones.
    """
    columns = values.float().transpose(0, 1).reshape(values.shape[1], -1)
    if columns.shape[1] < VALUES:
        return False
    scale = variance.float().clamp(min=1e-12)
    distance = (columns.mean(1) - mean).abs() / scale.sqrt()
    ratio = columns.var(1).clamp(min=1e-12) / scale
    is_another_scale = float(ratio.log().abs().median()) > math.log(FAR_VARIANCE)
    return bool(float(distance.median()) > FAR_MEAN or is_another_scale)


def check_dropout(evidence: Evidence) -> Iterator[Finding]:
    """Find dropout that takes nearly everything."""
    layers = evidence.layers
    dropouts = [layer for layer in layers if layer.kind == DROPOUT]
    always = [layer for layer in dropouts if layer.is_on_in_eval]
    if always:
        yield Finding(
            "warning",
            always[0].called,
            f"dropout of {always[0].rate:g} is on in eval mode too",
            "train mode only",
            "Predictions are random. Write F.dropout(x, p, training=self.training), or use "
            "nn.Dropout.",
        )
    at_end = [layer for layer in dropouts if layer.is_output]
    if at_end:
        yield Finding(
            "warning",
            at_end[0].called,
            f"dropout of {at_end[0].rate:g} after the last layer",
            "none there",
            "It sets outputs to 0, and the loss compares them with the labels. Put dropout before "
            "the last layer.",
        )
    high = find_high_dropout(evidence, dropouts)
    if high:
        name, rate = max(high.items(), key=lambda item: item[1])
        yield Finding(
            "warning",
            name if len(high) == 1 else f"{name} and {len(high) - 1} more",
            f"dropout removes {rate:.0%}",
            "10 % to 50 %",
            "Too little is left to learn from. Use p=0.1 to 0.5.",
        )
        return
    stacked = find_stacked(layers)
    if stacked is not None:
        names, share = stacked
        yield Finding(
            "warning",
            f"dropout {join_words(names)}",
            f"{len(names)} in a row leave {share:.0%} of the values",
            "50 % or more",
            "There is no layer with weights between them. Keep one of them.",
        )
        return
    for layer in layers:
        if layer.kind == LAYER and layer.has_weights:
            return
        if layer.kind == DROPOUT and layer.rate >= INPUT_DROPOUT:
            yield Finding(
                "warning",
                layer.called,
                f"dropout removes {layer.rate:.0%} of the features",
                "0 to 20 %",
                "Rows lose half of what they are told apart by. Put dropout between the last "
                "layers, or use p=0.1 here.",
            )
            return


def find_high_dropout(evidence: Evidence, dropouts: list[LayerStatistics]) -> dict[str, float]:
    """Return the layers whose dropout is high, with its rate; also inside of LSTMs."""
    high = {}
    for layer in dropouts:
        if layer.rate >= HIGH_DROPOUT:
            high[layer.called] = layer.rate
    for name, module in evidence.model.named_modules():
        has_rate = isinstance(module, (nn.RNNBase, nn.MultiheadAttention))
        rate = getattr(module, "dropout", 0.0) if has_rate else 0.0
        if rate >= HIGH_DROPOUT:
            high[f"layer {name} ({type(module).__name__})"] = rate
    return high


def find_stacked(layers: list[LayerStatistics]) -> tuple[list[str], float] | None:
    """Return dropouts with no weights between them, and the share of values that they leave."""
    names: list[str] = []
    share = 1.0
    for layer in layers:
        if layer.kind == DROPOUT:
            names.append(layer.name)
            share *= 1 - layer.rate
            if len(names) > 1 and share < SMALLEST_SHARE:
                return names, share
        elif layer.kind == LAYER and layer.has_weights:
            names = []
            share = 1.0
    return None
