"""Compare nests of numbers and tensors, and the weights of models."""

import torch


def assert_same(found, expected, where=""):
    """Compare two nests of numbers and tensors."""

    def told(said):
        return f"{where}\n{said}"

    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True, msg=told)


def assert_same_weights(found, expected, tolerance=1e-6):
    """Compare two models' weights and buffers, in their order."""
    pairs = zip(found.state_dict().items(), expected.state_dict().values(), strict=True)
    for (name, tensor), other in pairs:
        torch.testing.assert_close(
            tensor, other, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_equal_tensors(first, second):
    """Compare two dicts of tensors exactly."""
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def copy_weights(model):
    """Copy a model's weights and buffers, by name."""
    return {name: value.clone() for name, value in model.state_dict().items()}
