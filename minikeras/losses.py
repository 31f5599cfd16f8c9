"""Losses that torch.nn lacks: focal loss, L1 and L2 penalties, weight decay without the biases.

    objective = loss_func(y_pred, y_true) + l1 * sum |w| + 0.5 * l2 * sum w^2

where w are the weights, not the biases. Losses and metrics are called with (y_pred, y_true), unlike
TensorFlow's, which take y_true first.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minikeras.errors import check_one_of, describe, did_you_mean, write_instance
from minikeras.hooks import Fit, Hook
from minikeras.nests import is_sharded
from minikeras.results import Average, Loss, LossParts, refuse_several


class FocalLoss(nn.Module):
    """Binary cross entropy that gives little weight to elements already predicted well.

    The loss is -a_t * (1 - p_t)^gamma * log(p_t), where p_t is the probability of the true class,
    and a_t is `alpha` for positives and 1 - `alpha` for negatives: Lin et al. 2017, "Focal Loss for
    Dense Object Detection", equations 4 (without a_t) and 5. With gamma=0 and alpha=0.5 it is half
    the binary cross entropy.

    Args:
        gamma: how fast the weight of easy elements decreases, 0 or more, default 2; with 0 it does
            not decrease.
        alpha: weight of the positives, from 0 to 1. The default, 0.75, suits rare positives; the
            paper's detectors use 0.25.
        from_logits: y_pred is raw scores instead of probabilities; default False. Raw scores are
            exact at any size, and mixed precision on a GPU requires them.
        reduction: "mean", the default, or "sum" over all elements; or "none": one value per
            element, for a weight per row.

    Called with (y_pred, y_true), unlike TensorFlow's losses: probabilities of any shape, and labels
    of the same shape and any dtype, 0 or 1 or between (smoothed). Returns float32, or float64 if
    y_pred is float64.

    Raises:
        ValueError: an argument out of range, or y_pred and y_true of different shapes.
        RuntimeError: probabilities below 0 or above 1, from torch; in `fit` and `evaluate` a
            ValueError.

    >>> y_pred, y_true = torch.tensor([[0.9], [0.1]]), torch.tensor([[1.0], [0.0]])
    >>> nn.BCELoss()(y_pred, y_true), FocalLoss()(y_pred, y_true)
    (tensor(0.1054), tensor(0.0005))
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float = 0.75,
        *,
        from_logits: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if not 0 <= gamma < float("inf"):
            raise ValueError(
                f"gamma must be finite and 0 or more, got {gamma}. Pass 2.0, or 0 to fade nothing."
            )
        if not 0 <= alpha <= 1:
            raise ValueError(
                f"alpha must be 0 to 1, got {alpha}. Positives weigh alpha and negatives 1 - alpha."
            )
        check_one_of("reduction", reduction, ("mean", "sum", "none"))
        self.gamma: float = gamma
        self.alpha: float = alpha
        self.from_logits: bool = from_logits
        self.reduction: str = reduction

    @property
    def takes_probabilities(self) -> bool:
        """Whether y_pred is probabilities, and not raw scores."""
        return not self.from_logits

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        if y_pred.shape != y_true.shape:
            raise ValueError(
                f"FocalLoss compares element by element: expected y_true of y_pred's shape "
                f"{tuple(y_pred.shape)}, got {tuple(y_true.shape)}. Pass "
                f"y_true.reshape(y_pred.shape), or one-hot labels for several classes."
            )
        # bfloat16 would keep only two or three digits
        y_pred = y_pred.to(torch.promote_types(y_pred.dtype, torch.float32))
        y_true = y_true.to(y_pred.dtype)
        terms = _terms_of_logits if self.from_logits else _terms_of_probabilities
        cross_entropy, fading = terms(y_pred, y_true, self.gamma)
        loss = (y_true * self.alpha + (1 - y_true) * (1 - self.alpha)) * fading * cross_entropy
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()

    def extra_repr(self) -> str:
        shown = ("gamma", "alpha", "from_logits", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


def _terms_of_logits(logits: Tensor, y_true: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Compute -log(p_t) and (1 - p_t)^gamma, each of the logits' shape."""
    log_p = F.logsigmoid(logits)
    log_not_p = F.logsigmoid(-logits)
    # not BCEWithLogits: float32 rounds it to 0 for a negative with a score below about -15
    cross_entropy = -(y_true * log_p + (1 - y_true) * log_not_p)
    # the power as exp of a log: 1 - p_t underflows to 0, where a power below 1 has an infinite
    # slope
    log_miss = torch.logaddexp((1 - y_true).log() + log_p, y_true.log() + log_not_p)
    return cross_entropy, (gamma * log_miss).exp()


def _terms_of_probabilities(p: Tensor, y_true: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Compute -log(p_t), limited to 100 as in BCELoss, and (1 - p_t)^gamma, of the shape of `p`."""
    miss = y_true * (1 - p) + (1 - y_true) * p
    if 0 < gamma < 1:
        # at 0 the slope is infinite, and infinity * 0 is NaN
        miss = miss.clamp(min=torch.finfo(p.dtype).tiny)
    return F.binary_cross_entropy(p, y_true, reduction="none"), miss**gamma


def weights_and_biases(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the weights and the biases of a model, each parameter once.

    The last part of a name decides: `lstm.bias_ih_l0` is a bias, `unbiased.weight` is not. The
    scale of a BatchNorm, its `weight`, is no bias either.
    """
    weights: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    # named_parameters yields a tied parameter once, under its first name
    for name, parameter in model.named_parameters():
        if _is_bias(name):
            biases.append(parameter)
        else:
            weights.append(parameter)
    return weights, biases


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


# during a fit: the weights of each model, collected once; several dicts if fits are nested
_found: list[dict[nn.Module, list[nn.Parameter]]] = []


class WeightsFoundOnce(Hook):
    """During a fit, let penalties look for a model's weights at their first call only."""

    @contextlib.contextmanager
    def around_fit(self, fit: Fit) -> Iterator[None]:
        """Remember them. Sharded weights are collected at once: some leave the model in a step."""
        found = {}
        if any(map(is_sharded, fit.model.parameters())):
            for module in fit.model.modules():
                found[module] = weights_and_biases(module)[0]
        _found.append(found)
        try:
            yield
        finally:
            _found.pop()


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable weights of a model, without biases."""
    # is_compiling comes first: a graph must not depend on `_found`
    if torch.compiler.is_compiling() or not _found:
        weights = weights_and_biases(model)[0]
    elif model in _found[-1]:
        weights = _found[-1][model]
    else:
        weights = weights_and_biases(model)[0]
        _found[-1][model] = weights
    return [weight for weight in weights if weight.requires_grad]


def penalty(weights: Sequence[Tensor], l1: float = 0.0, l2: float = 0.0) -> Tensor:
    """Compute l1 * sum |w| + 0.5 * l2 * sum w^2 over all elements.

    The result is 0-dimensional, on the device of the first weight.
    """
    if not weights or not (l1 or l2):
        return torch.zeros(())
    if not torch.compiler.is_compiling() and any(map(is_sharded, weights)):
        return _penalty_of_sharded(weights, l1, l2)
    wide = []
    for weight in weights:
        # float16 ends at 65504
        wide.append(weight.float() if weight.dtype.itemsize < 4 else weight)
    # each strength is multiplied once: on small models these few operations cost as much as the
    # network
    terms = []
    if l1:
        terms.append(l1 * _total([torch.linalg.vector_norm(weight, 1) for weight in wide]))
    if l2:
        terms.append((0.5 * l2) * _total([weight.square().sum() for weight in wide]))
    return _total(terms)


def _penalty_of_sharded(weights: Sequence[Any], l1: float, l2: float) -> Tensor:
    """Compute the penalty of weights that are sharded over several processes.

    Each process takes its own shards, and the results are added up.
    """
    from minikeras.distributed.shards import sum_of_parts  # only several processes have parts

    sharded = []
    others = []
    for weight in weights:
        if is_sharded(weight):
            sharded.append(weight)
        else:
            others.append(weight)
    local = [weight.to_local() for weight in sharded]
    total = sum_of_parts(penalty(local, l1, l2), sharded[0])
    if others:
        total = total + penalty(others, l1, l2)
    return total


def _total(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    return total


def l1_penalty(model: nn.Module, beta: float) -> Tensor:
    """Compute beta * sum |w| over the trainable weights, without biases.

    It drives weights to 0: Tibshirani 1996, "Regression Shrinkage and Selection via the Lasso".

    Args:
        model: any module; each of its parameters counts once.
        beta: strength, 0 or more, in units of the loss per unit of weight.

    Returns:
        0-dimensional, with a gradient, on the model's device; a plain 0 if there are no weights or
        `beta` is 0.

    Raises:
        ValueError: a negative `beta`.

    >>> model = nn.Sequential(nn.Linear(2, 1))
    >>> _ = nn.init.constant_(model[0].weight, -2.0)
    >>> l1_penalty(model, 0.5), l2_penalty(model, 0.5)
    (tensor(2., grad_fn=<MulBackward0>), tensor(2., grad_fn=<MulBackward0>))
    """
    return penalty(weights_of(model), l1=_strength("beta", beta))


def l2_penalty(model: nn.Module, alpha: float) -> Tensor:
    """Compute 0.5 * alpha * sum w^2 over the trainable weights, without biases.

    It keeps weights small (ridge: Hoerl and Kennard 1970). Its gradient is alpha * w. For `model`,
    the strength `alpha`, the result and errors see `l1_penalty`, which has an example of both.

    >>> model = nn.Linear(2, 1)
    >>> l2_penalty(model, 0.1).backward()
    >>> torch.allclose(model.weight.grad, 0.1 * model.weight), model.bias.grad
    (True, None)
    """
    return penalty(weights_of(model), l2=_strength("alpha", alpha))


class Regularized(nn.Module):
    """Add `l1_penalty` and `l2_penalty` of a model to a loss; pass the result to `compile`.

    Args:
        loss_func: function or module called with (y_pred, y_true), unlike TensorFlow's losses; you
            can access it as `.loss_func`. Or a dict of losses for several outputs, as in `compile`:
            the penalty is added to their sum, once.
        model: the model whose weights are penalized. It is not a submodule: `parameters()`,
            `state_dict()` and `.to()` do not reach it. A deepcopy contains a copy of the model too,
            so copy the two together.
        l1, l2: strengths, 0 or more, default 0.

    The penalty is added to a scalar loss, and to each value of a loss per row (reduction="none"),
    so that sample weights apply to it too. An `Average(total, count)` becomes
    Average(total + penalty * count, count), so that its mean includes the penalty once as well.

    Raises:
        TypeError: a class instead of a loss, or a model that is not a module.
        ValueError: a negative strength; or, when called, a loss that returns a tuple, list or dict.

    >>> Regularized(FocalLoss(), nn.Linear(2, 1), l2=0.001)
    Regularized(
      l1=0.0, l2=0.001
      (loss_func): FocalLoss(gamma=2.0, alpha=0.75, from_logits=False, reduction='mean')
    )
    """

    wraps_loss = True  # for whoever asks about the loss inside

    def __init__(
        self,
        loss_func: Callable[..., Loss] | Mapping[Any, Any],
        model: nn.Module,
        l1: float = 0.0,
        l2: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(loss_func, Mapping):
            from minikeras.by_name import LossesByName  # loaded only if it is asked for

            loss_func = LossesByName(loss_func)
        if isinstance(loss_func, type):
            raise TypeError(
                f"loss_func is the class {loss_func.__name__}; expected an instance. Pass "
                f"{write_instance(loss_func)}."
            )
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {describe(model)}. Pass the one that is "
                "trained."
            )
        self.loss_func = loss_func
        self._model_in_tuple = (model,)  # not a submodule: nn.Module does not look into tuples
        self.l1: float = _strength("l1", l1)
        self.l2: float = _strength("l2", l2)

    def forward(self, y_pred: Any, y_true: Any) -> Loss | LossParts:
        loss = self.loss_func(y_pred, y_true)
        if not isinstance(loss, Tensor):
            loss = getattr(loss, "loss", loss)
        added = penalty(weights_of(self._model_in_tuple[0]), self.l1, self.l2)
        if isinstance(loss, LossParts):
            return loss._replace(added=loss.added + added)
        if isinstance(loss, Average):
            return Average(loss.total + added * loss.count, loss.count)
        refuse_several("the loss", loss)
        return loss + added

    def extra_repr(self) -> str:
        return f"l1={self.l1}, l2={self.l2}"


def weight_decay_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    spare: str | Callable[[str, nn.Parameter], bool] = "bias",
) -> list[dict[str, Any]]:
    """Return two parameter groups for an optimizer: one with `weight_decay`, one spared, with 0.

    An empty group is left out. For SGD and Adam this equals `l2_penalty(model, weight_decay)`, at
    lower cost, if biases alone are spared. AdamW's decay is different, lr * weight_decay * w next
    to the step: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".

    Args:
        model: any module; each of its parameters is taken once. Frozen ones are taken too, so that
            they train once they are unfrozen; until then no optimizer moves or decays them.
        weight_decay: 0 or more, as the argument of this name of an optimizer.
        spare: what gets no weight decay. "bias", the default: the biases. "1d": biases and all
            parameters of one dimension or none, such as the gains of LayerNorm and BatchNorm. Or a
            function of (name, parameter) that returns True for those to spare.

    Raises:
        ValueError: a negative `weight_decay`, another word in `spare`, or "1d" with a lazy layer
            that has not seen a batch.
        TypeError: `model` is not a module; `spare` is neither a word nor a function of two
            arguments.

    >>> net = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    >>> groups = weight_decay_groups(net, 0.01, spare="1d")
    >>> optimizer = torch.optim.AdamW(groups, lr=0.001)
    >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    [(1, 0.01), (3, 0.0)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"weight_decay_groups expects `model`, a torch.nn.Module, got {describe(model)}. Pass "
            f"the network itself, not its parameters: weight_decay_groups(model, 0.01)."
        )
    _strength("weight_decay", weight_decay)
    is_spared = _choose_spared(spare)
    decayed = []
    spared = []
    # named_parameters yields a tied parameter once, under its first name
    for name, parameter in model.named_parameters():
        if is_spared(name, parameter):
            spared.append(parameter)
        else:
            decayed.append(parameter)
    groups = []
    if decayed:
        groups.append({"params": decayed, "weight_decay": weight_decay})
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return groups


def _choose_spared(spare: Any) -> Callable[[str, nn.Parameter], bool]:
    """Return the function of (name, parameter) that `spare` stands for."""
    if spare == "bias":
        return lambda name, parameter: _is_bias(name)
    if spare == "1d":
        return _has_one_dimension
    expected = '`spare` must be "bias", "1d" or a function of (name, parameter)'
    remedy = "Pass for instance spare=lambda name, parameter: parameter.ndim < 2"
    if isinstance(spare, str):
        hint = did_you_mean(spare, ("bias", "1d"))
        raise ValueError(f"{expected}, got {spare!r}. {remedy}.{hint}")
    if isinstance(spare, type):
        raise TypeError(f"{expected}, got the class {spare.__name__}. {remedy}.")
    if not callable(spare):
        raise TypeError(f"{expected}, got {describe(spare)}. {remedy}.")
    try:
        inspect.signature(spare).bind("name", "parameter")
    except TypeError as error:
        raise TypeError(
            f"{expected}, got one that cannot be called with the two: {error}. {remedy}."
        ) from None
    except ValueError:  # some functions of C have no signature
        pass
    function: Callable[[str, nn.Parameter], bool] = spare
    return function


def _has_one_dimension(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter is a bias, or has one dimension or none."""
    if is_lazy(parameter):
        raise ValueError(
            f'spare="1d" needs the shape of {name}, which a lazy layer has from its first batch '
            f"on. Call the model on a batch first."
        )
    return parameter.ndim <= 1 or _is_bias(name)


def _strength(name: str, value: float) -> float:
    """Return a strength; refuse a negative one and NaN."""
    if not value >= 0:  # NaN is refused as well
        raise ValueError(
            f"{name} must be 0 or more, got {value}. Less would reward large weights; pass 0 for "
            "none."
        )
    return value
