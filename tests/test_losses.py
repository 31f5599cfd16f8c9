"""minikeras.losses: values and gradients by formula, penalties by hand."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minikeras import Average
from minikeras.losses import (
    FocalLoss,
    Regularized,
    l1_penalty,
    l2_penalty,
    weight_decay_groups,
    weights_and_biases,
)

HARD = torch.tensor([[0.5], [0.5]])
EASY = torch.tensor([[0.9], [0.1]])
LABELS = torch.tensor([[1.0], [0.0]])
GAMMAS = [0.0, 0.01, 0.1, 0.5, 1.0, 1.5, 2.0, 5.0]


def exactly(message):
    return "^" + re.escape(message) + "$"


def reference(p, y, gamma, alpha):
    """Lin et al. 2017, equation 5, per element, in NumPy's float64."""
    p_t = y * p + (1 - y) * (1 - p)
    cross_entropy = -(y * np.log(p) + (1 - y) * np.log1p(-p))
    return (y * alpha + (1 - y) * (1 - alpha)) * (1 - p_t) ** gamma * cross_entropy


def reference_slope(z, y, gamma, alpha):
    """Return d loss / d logit for labels 0 and 1 by hand; exact, as 1 - p_t is no difference."""
    sign = 2 * y - 1
    log_p_t = -np.logaddexp(0, -sign * z)
    log_miss = -np.logaddexp(0, sign * z)
    a_t = y * alpha + (1 - y) * (1 - alpha)
    return (
        sign
        * a_t
        * np.exp(gamma * log_miss)
        * (gamma * np.exp(log_p_t) * log_p_t - np.exp(log_miss))
    )


# --- focal loss: values ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y_pred", "focal", "bce", "ratio"),
    [(HARD, "0.0866", "0.6931", 0.125), (EASY, "0.0005", "0.1054", 0.005)],
    ids=["hard", "easy"],
)
def test_focal_loss_lets_easy_samples_fade_and_hard_ones_stay(y_pred, focal, bce, ratio):
    focal_loss = FocalLoss()(y_pred, LABELS).item()
    bce_loss = nn.BCELoss()(y_pred, LABELS).item()
    assert (f"{focal_loss:.4f}", f"{bce_loss:.4f}") == (focal, bce)
    assert focal_loss / bce_loss == pytest.approx(ratio, rel=1e-5)


def test_focal_loss_weighs_positives_by_alpha_and_negatives_by_the_rest():
    per_element = FocalLoss(gamma=0.0, alpha=0.75, reduction="none")(HARD, LABELS)
    torch.testing.assert_close(per_element, math.log(2) * torch.tensor([[0.75], [0.25]]))


@given(
    logit=st.floats(-8, 8),
    label=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    gamma=st.floats(0, 5),
    alpha=st.floats(0, 1),
)
def test_focal_loss_of_logits_and_probabilities_is_that_of_the_paper(logit, label, gamma, alpha):
    z = torch.tensor([logit], dtype=torch.float64)
    y = torch.tensor([label], dtype=torch.float64)
    p = torch.sigmoid(z)
    expected = torch.from_numpy(reference(p.numpy(), y.numpy(), gamma, alpha))
    torch.testing.assert_close(
        FocalLoss(gamma, alpha, from_logits=True)(z, y), expected.mean(), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        FocalLoss(gamma, alpha)(p, y), expected.mean(), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_focal_loss_with_gamma_0_and_alpha_half_is_half_the_binary_cross_entropy(reduction):
    z = torch.linspace(-6, 6, 8).view(4, 2)
    y = torch.tensor([0.0, 1.0]).expand(4, 2)
    on_scores = FocalLoss(0.0, 0.5, from_logits=True, reduction=reduction)
    half = FocalLoss(0.0, 0.5, reduction=reduction)
    torch.testing.assert_close(
        on_scores(z, y), 0.5 * nn.BCEWithLogitsLoss(reduction=reduction)(z, y)
    )
    torch.testing.assert_close(
        half(z.sigmoid(), y), 0.5 * nn.BCELoss(reduction=reduction)(z.sigmoid(), y)
    )


def test_focal_loss_mean_and_sum_are_those_of_the_elements():
    y_pred = torch.rand(5, 3)
    y_true = torch.randint(2, (5, 3)).float()
    elements = FocalLoss(reduction="none")(y_pred, y_true)
    assert elements.shape == (5, 3)
    torch.testing.assert_close(FocalLoss()(y_pred, y_true), elements.mean())
    torch.testing.assert_close(FocalLoss(reduction="sum")(y_pred, y_true), elements.sum())


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_focal_loss_takes_labels_of_any_dtype(dtype, from_logits):
    focal_loss = FocalLoss(from_logits=from_logits)
    assert torch.equal(focal_loss(EASY, LABELS.to(dtype)), focal_loss(EASY, LABELS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_focal_loss_of_half_precision_scores_loses_no_further_digits(dtype):
    scores = torch.tensor([[1.5], [-0.75]])  # exact in half precision too
    loss = FocalLoss(from_logits=True)(scores.to(dtype), LABELS)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, FocalLoss(from_logits=True)(scores, LABELS))


def test_cross_entropy_is_log_softmax_then_negative_log_likelihood():
    y_pred = torch.tensor([[10.0, 0.0, -10.0], [8.0, 8.0, 8.0]])
    y_true = torch.tensor([0, 2])
    log_probabilities = nn.LogSoftmax(dim=1)(y_pred)
    torch.testing.assert_close(
        nn.CrossEntropyLoss()(y_pred, y_true), nn.NLLLoss()(log_probabilities, y_true)
    )


# --- focal loss: gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_loss_gradients_agree_with_finite_differences(gamma, from_logits):
    z = torch.tensor([-4.0, -1.0, -0.3, 0.5, 2.0, 4.0], dtype=torch.float64)
    y_pred = (z if from_logits else z.sigmoid()).requires_grad_()
    y_true = torch.tensor([0.0, 1.0, 0.2, 1.0, 0.9, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        FocalLoss(gamma, from_logits=from_logits, reduction="none"), (y_pred, y_true)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_loss_of_extreme_logits_has_the_right_value_and_gradient(gamma, dtype):
    z = torch.tensor([-1000.0, -100, -20, 20, 100, 1000]).to(dtype).repeat(2).requires_grad_()
    y = torch.tensor([0.0, 1.0]).to(dtype).repeat_interleave(6)
    loss = FocalLoss(gamma, from_logits=True, reduction="none")(z, y)
    loss.sum().backward()
    z64 = z.detach().double().numpy()
    y64 = y.double().numpy()
    sign = 2 * y64 - 1
    value = (
        (0.25 + 0.5 * y64)
        * np.exp(-gamma * np.logaddexp(0, sign * z64))
        * np.logaddexp(0, -sign * z64)
    )
    slope = reference_slope(z64, y64, gamma, 0.75)
    torch.testing.assert_close(
        loss.detach().double(), torch.from_numpy(value), rtol=1e-5, atol=1e-30
    )
    torch.testing.assert_close(z.grad.double(), torch.from_numpy(slope), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_loss_of_probabilities_of_exactly_0_and_1_and_its_gradient_are_finite(gamma, dtype):
    p = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=dtype, requires_grad=True)
    y = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=dtype)
    loss = FocalLoss(gamma, reduction="none")(p, y)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0, 75.0, 25.0]  # BCELoss, too, ends at 100
    assert p.grad.isfinite().all()
    assert p.grad.sign().tolist() == [0.0, 0.0, -1.0, 1.0]


# --- focal loss: what it says ---------------------------------------------------------------------


def test_focal_loss_prints_its_arguments():
    assert (
        repr(FocalLoss()) == "FocalLoss(gamma=2.0, alpha=0.75, from_logits=False, reduction='mean')"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"gamma": -1.0},
            "gamma must be finite and 0 or more, got -1.0. Pass 2.0, or 0 to fade nothing.",
        ),
        (
            {"gamma": math.inf},
            "gamma must be finite and 0 or more, got inf. Pass 2.0, or 0 to fade nothing.",
        ),
        (
            {"gamma": math.nan},
            "gamma must be finite and 0 or more, got nan. Pass 2.0, or 0 to fade nothing.",
        ),
        (
            {"alpha": 1.5},
            "alpha must be 0 to 1, got 1.5. Positives weigh alpha and negatives 1 - alpha.",
        ),
        (
            {"alpha": -0.1},
            "alpha must be 0 to 1, got -0.1. Positives weigh alpha and negatives 1 - alpha.",
        ),
        (
            {"reduction": "means"},
            "reduction must be 'mean', 'sum' or 'none', got 'means'. Did you mean 'mean'?",
        ),
        (
            {"reduction": None},
            "reduction must be 'mean', 'sum' or 'none', got None. Did you mean 'none'?",
        ),
        ({"reduction": "batch"}, "reduction must be 'mean', 'sum' or 'none', got 'batch'."),
    ],
)
def test_focal_loss_names_a_wrong_argument_with_its_remedy(arguments, message):
    with pytest.raises(ValueError, match=exactly(message)):
        FocalLoss(**arguments)


@pytest.mark.parametrize("from_logits", [True, False])
def test_focal_loss_refuses_labels_that_broadcast_against_the_predictions(from_logits):
    message = (
        "FocalLoss compares element by element: expected y_true of y_pred's shape (4, 1), got "
        "(4,). Pass y_true.reshape(y_pred.shape), or one-hot labels for several classes."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        FocalLoss(from_logits=from_logits)(torch.full((4, 1), 0.5), torch.ones(4))


# --- penalties ------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Embedding(5, 3)
        self.decoder = nn.Linear(3, 5)
        self.decoder.weight = self.encoder.weight


class Unbiased(nn.Module):
    def __init__(self):
        super().__init__()
        self.unbiased = nn.Linear(2, 3)
        self.bias_net = nn.Linear(3, 1, bias=False)


def frozen_first():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    return model


CASES = {  # a model, and the names of the weights that count
    "linear": (lambda: nn.Linear(3, 2), ["weight"]),
    "lstm": (lambda: nn.LSTM(3, 4), ["weight_ih_l0", "weight_hh_l0"]),
    "attention": (lambda: nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
    "a layer merely called so": (Unbiased, ["unbiased.weight", "bias_net.weight"]),
    "tied": (Tied, ["encoder.weight"]),
    "frozen": (frozen_first, ["1.weight"]),
    "batch norm": (lambda: nn.BatchNorm1d(3), ["weight"]),
    "float64": (lambda: nn.Linear(3, 2).double(), ["weight"]),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def model_and_names(request):
    torch.manual_seed(0)
    build, names = request.param
    return build(), names


def test_penalties_count_each_trainable_weight_once_and_no_bias(model_and_names):
    model, names = model_and_names
    numbers = np.concatenate(
        [model.get_parameter(name).detach().double().numpy().ravel() for name in names]
    )
    assert l1_penalty(model, 0.3).item() == pytest.approx(0.3 * np.abs(numbers).sum(), rel=1e-6)
    assert l2_penalty(model, 0.3).item() == pytest.approx(0.15 * (numbers**2).sum(), rel=1e-6)


def test_penalties_pull_on_the_weights_alone(model_and_names):
    model, names = model_and_names
    objective = l1_penalty(model, 0.5) + l2_penalty(model, 0.1)
    assert objective.shape == ()
    objective.backward()
    for name, parameter in model.named_parameters():
        if name in names:
            torch.testing.assert_close(
                parameter.grad, 0.5 * parameter.sign().detach() + 0.1 * parameter.detach()
            )
        else:
            assert parameter.grad is None


def test_penalties_of_weights_and_biases_together_are_of_all_parameters(model_and_names):
    weights, biases = weights_and_biases(model_and_names[0])
    assert {id(parameter) for parameter in weights + biases} == {
        id(p) for p in model_and_names[0].parameters()
    }
    assert len(weights + biases) == len(list(model_and_names[0].parameters()))


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.Linear(3, 2).requires_grad_(False)], ids=["empty", "frozen"]
)
@pytest.mark.parametrize("a_penalty", [l1_penalty, l2_penalty])
def test_penalties_of_a_model_without_trainable_weights_are_0(model, a_penalty):
    assert a_penalty(model, 0.1).item() == 0.0
    assert a_penalty(model, 0.1).shape == ()


@pytest.mark.parametrize("a_penalty", [l1_penalty, l2_penalty])
def test_penalties_are_on_the_device_of_the_model(a_penalty):
    assert a_penalty(nn.Linear(3, 2, device="meta"), 0.1).device.type == "meta"


def test_penalties_of_a_half_precision_model_do_not_overflow():
    model = nn.Linear(300, 300).half()
    nn.init.constant_(model.weight, 4.0)
    assert l1_penalty(model, 1.0).item() == 360_000.0
    assert l2_penalty(model, 1.0).item() == 720_000.0


# --- Regularized ----------------------------------------------------------------------------------


def test_regularized_adds_both_penalties_to_the_loss():
    model = nn.Linear(3, 1)
    features = torch.rand(4, 3)
    y_pred = model(features)
    y_true = torch.rand(4, 1)
    expected = (
        nn.functional.mse_loss(y_pred, y_true) + l1_penalty(model, 0.1) + l2_penalty(model, 0.2)
    )
    for loss_func in (nn.functional.mse_loss, nn.MSELoss()):
        regularized = Regularized(loss_func, model, l1=0.1, l2=0.2)
        assert regularized.loss_func is loss_func
        torch.testing.assert_close(regularized(y_pred, y_true), expected)


@pytest.mark.parametrize(
    ("loss_func", "model", "message"),
    [
        (
            nn.MSELoss,
            nn.Linear(3, 1),
            "loss_func is the class MSELoss; expected an instance",
        ),
        (
            nn.MSELoss(),
            0.1,
            "model must be a torch.nn.Module, got float. Pass the one that is trained.",
        ),
    ],
)
def test_regularized_refuses_what_is_no_loss_or_no_model(loss_func, model, message):
    with pytest.raises(TypeError) as caught:
        Regularized(loss_func, model)
    assert str(caught.value).startswith(message)


def test_regularized_passes_predictions_first_and_labels_second():
    seen = []
    Regularized(lambda y_pred, y_true: seen.append((y_pred, y_true)) or torch.zeros(()), nn.ReLU())(
        "pred", "true"
    )
    assert seen == [("pred", "true")]


@pytest.mark.parametrize("form", ["scalar", "per row", "average"])
def test_regularized_adds_the_penalty_to_the_mean_once_for_any_form_of_loss(form):
    def loss_func(y_pred, y_true):
        rows = (y_pred - y_true).square().mean(dim=1)
        return {
            "scalar": rows.mean(),
            "per row": rows,
            "average": Average(rows.sum(), torch.tensor(len(rows))),
        }[form]

    model = nn.Linear(3, 2)
    y_pred = torch.rand(5, 2)
    y_true = torch.rand(5, 2)
    loss = Regularized(loss_func, model, l1=0.1, l2=0.2)(y_pred, y_true)
    mean = loss[0] / loss[1] if form == "average" else loss.mean()
    expected = (
        nn.functional.mse_loss(y_pred, y_true) + l1_penalty(model, 0.1) + l2_penalty(model, 0.2)
    )
    torch.testing.assert_close(mean, expected)
    if form == "average":
        assert loss[1] == 5
    elif form == "per row":
        assert loss.shape == (5,)


def test_regularized_holds_class_weights_and_not_the_model():
    model = nn.Linear(3, 2)
    class_weights = torch.ones(2)
    regularized = Regularized(nn.CrossEntropyLoss(weight=class_weights), model, l2=0.1)
    assert list(regularized.parameters()) == []
    assert list(regularized.state_dict()) == ["loss_func.weight"]
    assert model not in list(regularized.modules())
    regularized.to(torch.float64).eval()
    assert regularized.loss_func.weight.dtype == torch.float64
    assert model.weight.dtype == torch.float32
    assert model.training


def test_regularized_in_its_own_model_leaves_the_state_dict_as_it_was():
    model = nn.Linear(3, 2)
    names = list(model.state_dict())
    model.loss = Regularized(nn.MSELoss(), model, l2=0.1)
    assert list(model.state_dict()) == names
    assert len(list(model.modules())) == 3


def test_regularized_penalizes_a_replaced_layer_from_then_on():
    model = nn.Sequential(nn.Linear(3, 2))
    regularized = Regularized(nn.MSELoss(), model, l1=1.0)
    y = torch.zeros(2)
    regularized(y, y)
    model[0] = nn.Linear(3, 2)
    torch.testing.assert_close(regularized(y, y), model[0].weight.abs().sum())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
@pytest.mark.parametrize("order", [1, -1], ids=["model first", "loss first"])
def test_regularized_copied_with_its_model_penalizes_the_copy(duplicate, order):
    model = nn.Linear(3, 2)
    model_copy, loss_copy = duplicate((model, Regularized(nn.MSELoss(), model, l1=1.0))[::order])[
        ::order
    ]
    loss_copy(torch.zeros(2), torch.zeros(2)).backward()
    torch.testing.assert_close(model_copy.weight.grad, model.weight.sign().detach())
    assert model.weight.grad is None


def test_regularized_without_strengths_is_the_loss():
    y_pred = torch.rand(4, 1)
    y_true = torch.rand(4, 1)
    assert torch.equal(
        Regularized(nn.MSELoss(), nn.Linear(1, 1))(y_pred, y_true), nn.MSELoss()(y_pred, y_true)
    )


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("beta", lambda model, value: l1_penalty(model, value)),
        ("alpha", lambda model, value: l2_penalty(model, value)),
        ("l1", lambda model, value: Regularized(nn.MSELoss(), model, l1=value)),
        ("l2", lambda model, value: Regularized(nn.MSELoss(), model, l2=value)),
        ("weight_decay", lambda model, value: weight_decay_groups(model, value)),
    ],
)
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_penalties_of_negative_strength_are_refused_by_name(name, call, value):
    message = (
        f"{name} must be 0 or more, got {value}. Less would reward large weights; pass 0 for none."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        call(nn.Linear(3, 2), value)


# --- weight decay ---------------------------------------------------------------------------------


def test_weight_decay_groups_decay_weights_and_not_biases(model_and_names):
    model, names = model_and_names
    decay_of = {}
    for group in weight_decay_groups(model, 1e-5):
        for p in group["params"]:
            decay_of[id(p)] = group["weight_decay"]
    parameters = dict(model.named_parameters())  # frozen ones too: they may be unfrozen later
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    assert {name: decay_of[id(p)] for name, p in trainable.items()} == {
        name: 1e-5 if name in names else 0.0 for name in trainable
    }
    assert (
        len(decay_of)
        == sum(len(group["params"]) for group in weight_decay_groups(model, 1e-5))
        == len(parameters)
    )


@pytest.mark.parametrize(
    ("model", "decays"),
    [
        (nn.Linear(3, 2), [0.1, 0.0]),
        (nn.Linear(3, 2, bias=False), [0.1]),
        (nn.Linear(3, 2).requires_grad_(False), [0.1, 0.0]),
        (nn.ReLU(), []),
    ],
    ids=["both", "no bias", "frozen", "no parameters"],
)
def test_weight_decay_groups_are_not_empty(model, decays):
    assert [group["weight_decay"] for group in weight_decay_groups(model, 0.1)] == decays


class Mixed(nn.Module):
    """A convolution, its norm, an embedding, a scale of no dimension, and an attention."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 1)
        self.norm = nn.BatchNorm1d(3)
        self.emb = nn.Embedding(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.attn = nn.MultiheadAttention(3, 1, add_bias_kv=True)


SPARED = {
    "bias": ["conv.bias", "norm.bias", "attn.in_proj_bias", "attn.bias_k", "attn.bias_v"],
    "1d": ["norm.weight", "scale", "attn.out_proj.bias"],
}


@pytest.mark.parametrize(
    ("spare", "expected"),
    [
        ("bias", [*SPARED["bias"], "attn.out_proj.bias"]),
        ("1d", [*SPARED["bias"], *SPARED["1d"]]),  # bias_k and bias_v have three dimensions
        (lambda name, parameter: parameter.ndim < 2 or name.startswith("emb"), None),
    ],
    ids=["bias", "1d", "function"],
)
def test_weight_decay_groups_spare_what_they_are_told_to(spare, expected):
    model = Mixed()
    if expected is None:
        expected = [name for name, p in model.named_parameters() if p.dim() < 2]
        expected.append("emb.weight")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = weight_decay_groups(model, 0.1, spare=spare)
    found = {}
    for group in groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = group["weight_decay"]
    assert found == {name: 0.0 if name in expected else 0.1 for name in names.values()}
    assert len(found) == sum(len(group["params"]) for group in groups)


@pytest.mark.parametrize(
    ("spare", "error", "message"),
    [
        ("biases", ValueError, "got 'biases'. {remedy} Did you mean 'bias'?"),
        (True, TypeError, "got bool. {remedy}"),
        (nn.LayerNorm, TypeError, "got the class LayerNorm. {remedy}"),
        (
            lambda parameter: parameter.ndim < 2,
            TypeError,
            "got one that cannot be called with the two: too many positional arguments. {remedy}",
        ),
    ],
)
def test_weight_decay_groups_refuse_another_spare(spare, error, message):
    message = '`spare` must be "bias", "1d" or a function of (name, parameter), ' + message.format(
        remedy="Pass for instance spare=lambda name, parameter: parameter.ndim < 2."
    )
    with pytest.raises(error, match=exactly(message)):
        weight_decay_groups(nn.Linear(3, 2), 0.1, spare=spare)
    remedy = weight_decay_groups(
        nn.Linear(3, 2), 0.1, spare=lambda name, parameter: parameter.ndim < 2
    )
    assert [group["weight_decay"] for group in remedy] == [0.1, 0.0]


def test_weight_decay_groups_refuse_parameters_in_place_of_the_model():
    message = (
        "weight_decay_groups expects `model`, a torch.nn.Module, got generator. Pass the network "
        "itself, not its parameters: weight_decay_groups(model, 0.01)."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        weight_decay_groups(nn.Linear(3, 2).parameters(), 0.01)


def test_weight_decay_groups_by_dimensions_need_the_shapes_of_lazy_layers():
    model = nn.Sequential(nn.LazyLinear(2))
    message = (
        'spare="1d" needs the shape of 0.weight, which a lazy layer has from its first batch on. '
        "Call the model on a batch first."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        weight_decay_groups(model, 0.1, spare="1d")
    model(torch.zeros(1, 3))
    groups = weight_decay_groups(model, 0.1, spare="1d")
    assert [group["params"][0].ndim for group in groups] == [2, 1]


def steps_taken(dtype, optimizer_class, options, by_penalty, decay=0.05, steps=50):
    """The parameters after `steps`, the decay done by `l2_penalty` or by the optimizer."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    features = torch.rand(32, 4).to(dtype)
    labels = torch.rand(32, 1).to(dtype)
    loss_func = Regularized(nn.MSELoss(), model, l2=decay if by_penalty else 0.0)
    optimizer = optimizer_class(
        model.parameters() if by_penalty else weight_decay_groups(model, decay), **options
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss_func(model(features), labels).backward()
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize(
    ("optimizer_class", "options", "dtype"),
    [
        (torch.optim.SGD, {"lr": 0.1}, torch.float32),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, torch.float64),
        (torch.optim.Adam, {"lr": 0.01}, torch.float64),
    ],
)
def test_weight_decay_groups_take_the_steps_of_the_l2_penalty(optimizer_class, options, dtype):
    by_penalty = steps_taken(dtype, optimizer_class, options, by_penalty=True)
    by_decay = steps_taken(dtype, optimizer_class, options, by_penalty=False)
    torch.testing.assert_close(by_penalty, by_decay, rtol=0, atol=1e-6)
