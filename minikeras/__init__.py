"""minikeras: Keras's compile, fit, evaluate and predict for PyTorch modules."""

from minikeras.losses import FocalLoss, Regularized, l1_penalty, l2_penalty, weight_decay_groups

__version__ = "0.1.0"

__all__ = ["FocalLoss", "Regularized", "l1_penalty", "l2_penalty", "weight_decay_groups"]
