"""Exceptions and callbacks that end a fit before its time."""

from minikeras import LambdaCallback


class Killed(BaseException):
    """End a fit as SIGKILL does: nothing that follows is saved."""


class Stopped(Exception):
    """End a fit as an error in the user's code does."""


def killed_after(count):
    """Return a callback that ends the fit after `count` batches, counted over all epochs."""

    def count_down(batch, logs):
        nonlocal count
        count -= 1
        if count < 0:
            raise Killed

    return LambdaCallback(on_batch_end=count_down)
