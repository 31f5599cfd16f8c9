"""Exceptions and callbacks that end a fit before its time."""

from minikeras import LambdaCallback


class Killed(BaseException):
    """Ends a fit as SIGKILL does: nothing that follows is saved."""


class Stopped(Exception):
    """Ends a fit as an error of the user's code does."""


def killed_after(count):
    """Dies as the batch of that number, counted over all epochs, has been saved."""

    def count_down(batch, logs):
        nonlocal count
        count -= 1
        if count < 0:
            raise Killed

    return LambdaCallback(on_batch_end=count_down)
