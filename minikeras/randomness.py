"""The random state of a run: of Python, NumPy, torch and the device, and of what data, model and callbacks reach.

states    plain values, for a file
restore   ... put back
reseed    ... begun anew
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minikeras.errors import CheckpointError
from minikeras.reachable import PlainAttributes, reachable

KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class Randomness:
    """The random generators that a fit draws from, the epochs its samplers stand at, and what its data counts.

    Args:
        device: where the model is.
        loaders: the loaders as the user gave them; None for one that there is not.
        roots: name -> object: the generators that these reach are held.
        counted: name -> object: the counters and lists that these reach are held, where they change.
        without: objects that are not looked into.
        uncounted: objects that may hold generators, and whose counters are not the data's.

    >>> randomness = Randomness(torch.device("cpu"), [])
    >>> before = randomness.states()
    >>> first = torch.rand(2), np.random.rand(), random.random()
    >>> randomness.restore(before)
    >>> torch.equal(first[0], torch.rand(2)), first[1:] == (np.random.rand(), random.random())
    (True, True)
    """

    def __init__(
        self,
        device: torch.device,
        loaders: list[Any],
        roots: Mapping[str, Any] | None = None,
        counted: Mapping[str, Any] | None = None,
        without: tuple[Any, ...] = (),
        uncounted: tuple[Any, ...] = (),
    ) -> None:
        self.device = device
        self.loaders = loaders
        if roots is None:
            roots = roots_of_order(loaders)
        self.generators = generators_in(roots, without)
        counting = [
            holder
            for loader in loaders
            for holder in holders_of(loader)
            if type(getattr(holder, "epoch", None)) is int
        ]
        self.samplers = [holder for holder in counting if hasattr(holder, "set_epoch")]
        self.attributes = PlainAttributes(counters_in(counted or {}, (*without, *uncounted)))

    def states(self) -> dict[str, Any]:
        """Where everything stands, as plain values."""
        return {
            "python": random.getstate(),
            "numpy": numpy_state(np.random.get_state(legacy=False)),
            "torch": torch.get_rng_state(),
            "device": device_states(self.device),
            "generators": {
                name: state_of(generator) for name, generator in self.generators.items()
            },
            "epochs": [sampler.epoch for sampler in self.samplers],
            "attributes": self.attributes.states(),
        }

    def check(self, states: Mapping[str, Any]) -> None:
        """Whether these states are of loaders made as these are.

        Raises:
            CheckpointError: the states are of other loaders.
        """
        generators = self.named(states["generators"])
        missing = [name for name in self.generators if name not in generators and is_of_data(name)]
        gone = [name for name in generators if name not in self.generators and is_of_data(name)]
        if missing or gone or len(states["epochs"]) != len(self.samplers):
            there = (
                ", ".join([*gone, *(name for name in generators if name in self.generators)])
                or "none"
            )
            here = ", ".join(self.generators) or "none"
            raise CheckpointError(
                "the checkpoint was written with other random generators or counting samplers in "
                f"the loaders: generators {there} and {len(states['epochs'])} samplers with "
                f"set_epoch, and here are {here} and {len(self.samplers)}. Make the loaders as "
                "they were made then."
            )
        for name, generator in self.generators.items():
            if name in generators and kind_of(generators[name]) != kind_of(state_of(generator)):
                raise CheckpointError(
                    f"the checkpoint was written with another kind of random generator at {name}. "
                    "Make it as it was made then."
                )

    def others(self, states: Mapping[str, Any]) -> list[str]:
        """The generators outside the loaders that only the states have, or only this run."""
        generators = self.named(states["generators"])
        return [
            name
            for name in {**generators, **self.generators}
            if (name in generators) != (name in self.generators)
        ]

    def named(self, generators: Any) -> dict[str, Any]:
        """The states of generators by name; files of older versions have a list, of the loaders' own."""
        if isinstance(generators, dict):
            return generators
        old = list_of_older_versions(self.loaders)
        names = {id(generator): name for name, generator in self.generators.items()}
        if len(old) != len(generators):
            raise CheckpointError(
                f"the checkpoint was written with {len(generators)} random generators in the "
                f"loaders, and here are {len(old)}. Make the loaders as they were made then."
            )
        states = dict(
            zip((names.get(id(generator), "") for generator in old), generators, strict=True)
        )
        for name, generator in self.generators.items():
            states.setdefault(name, state_of(generator))
        return states

    def restore(self, states: Mapping[str, Any]) -> None:
        """Put everything back where it stood.

        Raises:
            CheckpointError: the states are of other loaders.
        """
        self.check(states)
        random.setstate(states["python"])
        np.random.set_state(numpy_state(states["numpy"], back=True))
        torch.set_rng_state(states["torch"])
        set_device_states(self.device, states["device"])
        generators = self.named(states["generators"])
        for name, generator in self.generators.items():
            if name in generators:
                set_state(generator, generators[name])
        for sampler, epoch in zip(self.samplers, states["epochs"], strict=True):
            sampler.set_epoch(epoch)
        self.attributes.restore(states.get("attributes", {}))

    def moved(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """The states among these that the generators have left since; all the same: an empty dict."""
        now = self.draws()
        return {name: state for name, state in before.items() if not same_state(state, now[name])}

    def draws(self) -> dict[str, Any]:
        """The states of the generators alone, the global ones among them, in the quickest form."""
        states: dict[str, Any] = {
            "the global python": random.getstate(),
            "the global numpy": np.random.get_state(),
            "the global torch": torch.get_rng_state(),
        }
        for name, generator in self.generators.items():
            states[name] = state_of(generator)
        return states

    def put_draws(self, states: Mapping[str, Any]) -> None:
        """Put those generators back."""
        for name, state in states.items():
            if name == "the global python":
                random.setstate(state)
            elif name == "the global numpy":
                np.random.set_state(numpy_state(state, back=True))
            elif name == "the global torch":
                torch.set_rng_state(state)
            elif name in self.generators:
                set_state(self.generators[name], state)


def is_of_data(name: str) -> bool:
    return name.startswith(("dl_train", "dl_val"))


def kind_of(state: Any) -> Any:
    """What tells the state of one kind of generator from that of another."""
    if isinstance(state, dict):
        return state.get("bit_generator")
    return type(state), len(state)


def same_state(state: Any, other: Any) -> bool:
    if isinstance(state, Tensor):
        return torch.equal(state, other)
    if isinstance(state, tuple) and isinstance(state[1], np.ndarray):
        return state[2:] == other[2:] and np.array_equal(state[1], other[1])
    return bool(state == other)


def generators_in(roots: Mapping[str, Any], without: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The random generators that the roots reach, by name; one that cannot tell its state is left out."""
    found: dict[str, Any] = {}
    for name, value in reachable(roots, without):
        if isinstance(value, KINDS) and not isinstance(value, random.SystemRandom):
            found[name] = value
    return found


def counters_in(roots: Mapping[str, Any], without: tuple[Any, ...]) -> dict[str, Any]:
    """The objects that the roots reach and that may count in attributes of their own; torch's do not."""
    found: dict[str, Any] = {}
    for name, value in reachable(roots, without):
        kind = type(value)
        ours = kind.__module__.partition(".")[0] in (
            "torch",
            "minikeras",
            "numpy",
            "builtins",
            "functools",
        )
        if (
            isinstance(getattr(value, "__dict__", None), dict)
            and not ours
            and not isinstance(value, type)
        ):
            found[name] = value
    return found


def roots_of_order(loaders: list[Any]) -> dict[str, Any]:
    """What decides the order of loaders' rows: their samplers and generators, and not their datasets."""
    roots = {}
    for number, loader in enumerate(loaders):
        for part in ("generator", "batch_sampler", "sampler"):
            value = getattr(loader, part, None)
            if value is not None:
                roots[f"{number}.{part}"] = value
    return roots


def list_of_older_versions(loaders: list[Any]) -> list[Any]:
    """The generators that files of older versions hold, in their order."""
    holders = [holder for loader in loaders for holder in holders_of(loader)]
    held = [
        value for holder in holders for value in vars(holder).values() if isinstance(value, KINDS)
    ]
    return list({id(generator): generator for generator in held}.values())


def reseed(seed: int) -> None:
    """Start Python's, NumPy's and torch's global generators anew."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def holders_of(loader: Any) -> list[Any]:
    """A loader, its sampler, its batch sampler and what that samples from."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    return [holder for holder in found if hasattr(holder, "__dict__")]


def state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return numpy_state(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return numpy_state(generator.get_state(legacy=False))
    return generator.getstate()


def set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = numpy_state(state, back=True)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(numpy_state(state, back=True))
    else:
        generator.setstate(state)


def numpy_state(state: Any, back: bool = False) -> Any:
    """A state of NumPy's with its arrays as lists, or back; NumPy takes lists where it gave arrays, but wants uint."""
    if isinstance(state, dict):
        return {key: numpy_state(value, back) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return state.tolist()
    return np.array(state, np.uint64) if back and isinstance(state, list) else state


def device_states(device: torch.device) -> list[Tensor]:
    if device.type == "cpu":
        return []
    module = torch.get_device_module(device)
    return (
        list(module.get_rng_state_all())
        if hasattr(module, "get_rng_state_all")
        else [module.get_rng_state()]
    )


def set_device_states(device: torch.device, states: list[Tensor]) -> None:
    module = torch.get_device_module(device)
    if len(states) > 1:
        module.set_rng_state_all(states)
    elif states:
        module.set_rng_state(states[0])
