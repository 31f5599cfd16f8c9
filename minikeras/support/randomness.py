"""Save and restore the random state of a run: Python, NumPy, torch, device, data, callbacks.

states    return all random states as plain values, for a file
pack      make them small and quick to write
restore   set them again
reseed    seed the global generators
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minikeras.errors import CheckpointError
from minikeras.support.reachable import PlainAttributes, reachable

KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class Randomness:
    """The random generators of a fit, the epochs of its samplers, and the counters of its data.

    Args:
        device: the model's device.
        loaders: the loaders as the user passed them; None for a missing one.
        roots: name -> object; includes the generators that can be reached from them.
        counted: name -> object; includes the counters and lists that can be reached from them, if
            they change.
        without: objects that are not looked into.
        uncounted: objects that may have generators, but whose counters are not those of the data.

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
            roots = find_samplers(loaders)
        self.generators = find_generators(roots, without)
        self.samplers = []
        for loader in loaders:
            for part in list_parts(loader):
                if type(getattr(part, "epoch", None)) is int and hasattr(part, "set_epoch"):
                    self.samplers.append(part)
        self.attributes = PlainAttributes(find_counters(counted or {}, (*without, *uncounted)))

    def states(self) -> dict[str, Any]:
        """Return all states as plain values."""
        generators = {}
        for name, generator in self.generators.items():
            generators[name] = state_of(generator)
        return {
            "python": random.getstate(),
            "numpy": to_lists(np.random.get_state(legacy=False)),
            "torch": torch.get_rng_state(),
            "device": device_states(self.device),
            "generators": generators,
            "epochs": [sampler.epoch for sampler in self.samplers],
            "attributes": self.attributes.states(),
        }

    def check(self, states: Mapping[str, Any]) -> None:
        """Check that these states are of loaders built as these are.

        Raises:
            CheckpointError: the states are of other loaders.
        """
        generators = self.named(states["generators"])
        missing = [name for name in self.generators if name not in generators and is_of_data(name)]
        gone = [name for name in generators if name not in self.generators and is_of_data(name)]
        if missing or gone or len(states["epochs"]) != len(self.samplers):
            shared = [name for name in generators if name in self.generators]
            in_file = ", ".join([*gone, *shared]) or "none"
            in_loaders = ", ".join(self.generators) or "none"
            raise CheckpointError(
                "the checkpoint was written with loaders that have other random generators or "
                f"samplers: generators {in_file} and {len(states['epochs'])} samplers with "
                f"set_epoch, and these loaders have {in_loaders} and {len(self.samplers)}. Create "
                "the loaders as they were created then."
            )
        for name, generator in self.generators.items():
            if name not in generators:
                continue
            if identify(generators[name]) != identify(state_of(generator)):
                raise CheckpointError(
                    f"the checkpoint was written with another kind of random generator at {name}. "
                    "Create it as it was created then."
                )

    def others(self, states: Mapping[str, Any]) -> list[str]:
        """Name the generators that only the states have, or only this run."""
        generators = self.named(states["generators"])
        names = []
        for name in {**generators, **self.generators}:
            if (name in generators) != (name in self.generators):
                names.append(name)
        return names

    def named(self, generators: Any) -> dict[str, Any]:
        """Return states of generators by name.

        Files of older versions have a list, of the generators in the loaders.
        """
        if isinstance(generators, dict):
            return generators
        old = list_generators(self.loaders)
        names = {id(generator): name for name, generator in self.generators.items()}
        if len(old) != len(generators):
            raise CheckpointError(
                f"the checkpoint was written with {len(generators)} random generators in the "
                f"loaders, and these loaders have {len(old)}. Create the loaders as they were "
                "created then."
            )
        states = {}
        for generator, state in zip(old, generators, strict=True):
            states[names.get(id(generator), "")] = state
        for name, generator in self.generators.items():
            states.setdefault(name, state_of(generator))
        return states

    def restore(self, states: Mapping[str, Any]) -> None:
        """Set all states again.

        Raises:
            CheckpointError: the states are of other loaders.
        """
        self.check(states)
        random.setstate(to_tuples(states["python"]))
        np.random.set_state(to_arrays(states["numpy"]))
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
        """Return those of these states from which a generator has moved on since."""
        now = self.draws()
        return {name: state for name, state in before.items() if not same_state(state, now[name])}

    def draws(self) -> dict[str, Any]:
        """Return the states of all generators, including the global ones, in the quickest form."""
        states: dict[str, Any] = {
            "the global python": random.getstate(),
            "the global numpy": np.random.get_state(),
            "the global torch": torch.get_rng_state(),
        }
        for name, generator in self.generators.items():
            states[name] = state_of(generator)
        return states

    def put_draws(self, states: Mapping[str, Any]) -> None:
        """Set states that `draws` returned."""
        for name, state in states.items():
            if name == "the global python":
                random.setstate(state)
            elif name == "the global numpy":
                np.random.set_state(to_arrays(state))
            elif name == "the global torch":
                torch.set_rng_state(state)
            elif name in self.generators:
                set_state(self.generators[name], state)


def is_of_data(name: str) -> bool:
    """Tell whether the generator of this name belongs to a loader."""
    return name.startswith(("dl_train", "dl_val"))


def identify(state: Any) -> Any:
    """Return what tells the state of one kind of generator from that of another."""
    if isinstance(state, dict):
        return state.get("bit_generator")
    return type(state), len(state)


def same_state(state: Any, other: Any) -> bool:
    """Tell whether two states of one generator are equal."""
    if isinstance(state, Tensor):
        return torch.equal(state, other)
    if isinstance(state, tuple) and isinstance(state[1], np.ndarray):
        return state[2:] == other[2:] and np.array_equal(state[1], other[1])
    return bool(state == other)


def find_generators(roots: Mapping[str, Any], without: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Find the random generators that can be reached from the roots, by name.

    `random.SystemRandom` is left out, since it has no state.
    """
    generators: dict[str, Any] = {}
    for name, value in reachable(roots, without):
        if isinstance(value, KINDS) and not isinstance(value, random.SystemRandom):
            generators[name] = value
    return generators


def find_counters(roots: Mapping[str, Any], without: tuple[Any, ...]) -> dict[str, Any]:
    """Find the objects that can be reached from the roots and may count in attributes.

    Objects of these libraries do not.
    """
    libraries = ("torch", "minikeras", "numpy", "builtins", "functools")
    counters: dict[str, Any] = {}
    for name, value in reachable(roots, without):
        if isinstance(value, type) or type(value).__module__.partition(".")[0] in libraries:
            continue
        if isinstance(getattr(value, "__dict__", None), dict):
            counters[name] = value
    return counters


def find_samplers(loaders: list[Any]) -> dict[str, Any]:
    """Find what decides the order of rows: samplers and generators of loaders, not datasets."""
    roots = {}
    for number, loader in enumerate(loaders):
        for part in ("generator", "batch_sampler", "sampler"):
            value = getattr(loader, part, None)
            if value is not None:
                roots[f"{number}.{part}"] = value
    return roots


def list_generators(loaders: list[Any]) -> list[Any]:
    """List the generators that files of older versions have, in their order."""
    generators: dict[int, Any] = {}
    for loader in loaders:
        for part in list_parts(loader):
            for value in vars(part).values():
                if isinstance(value, KINDS):
                    generators[id(value)] = value
    return list(generators.values())


def reseed(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def list_parts(loader: Any) -> list[Any]:
    """List a loader, its sampler, its batch sampler and the sampler of that."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    return [part for part in parts if hasattr(part, "__dict__")]


def state_of(generator: Any) -> Any:
    """Return the state of a generator as plain values."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return to_lists(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return to_lists(generator.get_state(legacy=False))
    return generator.getstate()


def set_state(generator: Any, state: Any) -> None:
    """Set a state that `state_of` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = to_arrays(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(to_arrays(state))
    else:
        generator.setstate(to_tuples(state))


def to_lists(state: Any) -> Any:
    """Convert the arrays in a state of NumPy to lists."""
    if isinstance(state, dict):
        return {key: to_lists(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return state.tolist()
    return state


def pack(states: Mapping[str, Any]) -> dict[str, Any]:
    """Return states of `Randomness` with an array in place of the words of each Mersenne Twister.

    Its 624 words would be as many objects to write. `restore` takes both forms.

    >>> states = pack(Randomness(torch.device("cpu"), []).states())
    >>> type(states["python"][1]).__name__, len(states["python"][1])
    ('ndarray', 625)
    """
    packed = dict(states)
    packed["python"] = pack_state(states["python"])
    packed["numpy"] = pack_state(states["numpy"])
    if isinstance(states["generators"], dict):  # a list in a file of an older version
        generators = {}
        for name, state in states["generators"].items():
            generators[name] = pack_state(state)
        packed["generators"] = generators
    return packed


def pack_state(state: Any) -> Any:
    """Return the state of one generator with an array in place of a Mersenne Twister's words."""
    if isinstance(state, tuple) and len(state) == 3:
        version, words, gauss = state
        return version, np.asarray(words, np.int64), gauss
    if isinstance(state, dict) and state.get("bit_generator") == "MT19937":
        inner = dict(state["state"])
        inner["key"] = np.asarray(inner["key"], np.int64)
        return {**state, "state": inner}
    return state


def to_tuples(state: Any) -> Any:
    """Convert the array in a packed state of Python's random to a tuple."""
    if isinstance(state[1], np.ndarray):
        return state[0], tuple(state[1].tolist()), state[2]
    return state


def to_arrays(state: Any) -> Any:
    """Convert the lists in a state of NumPy to arrays, which must be unsigned."""
    if isinstance(state, dict):
        return {key: to_arrays(value) for key, value in state.items()}
    if isinstance(state, list):
        return np.array(state, np.uint64)
    return state


def device_states(device: torch.device) -> list[Tensor]:
    """Return the states of the device's generators; the CPU's is torch's own."""
    if device.type == "cpu":
        return []
    module = torch.get_device_module(device)
    if hasattr(module, "get_rng_state_all"):
        return list(module.get_rng_state_all())
    return [module.get_rng_state()]


def set_device_states(device: torch.device, states: list[Tensor]) -> None:
    """Set states that `device_states` returned."""
    module = torch.get_device_module(device)
    if len(states) > 1:
        module.set_rng_state_all(states)
    elif states:
        module.set_rng_state(states[0])
