"""What all processes must have in common, compared before a weight moves and after each epoch.

    meet                    at the beginning of fit, evaluate, predict, save, export: the verb, the
                            model, loss, metrics, optimizers, arguments, data, and the weights;
                            buffers may differ, and then all use those of rank 0
    code_of_..., check_...  during a fit: learning rates, what is frozen, and the weights

If all is well, one small message is exchanged: a checksum of everything. If the checksums differ,
the processes send what they have to each other, and all raise the error that names it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minikeras.distributed.channel import VERBS, by_value, count_verb, verbs_met
from minikeras.nests import is_sharded
from minikeras.run import buffers_of, remember_buffers
from minikeras.sources import find_length

if TYPE_CHECKING:
    from minikeras.distributed.world import World
    from minikeras.run import Run

Facts = dict[str, str]

WITHOUT_SUMS = ("save", "export")  # verbs that add up nothing: they rescue weights after an error
MISSING = "nothing"
SHOWN = 3  # differences in one message
LONGEST = 120  # characters of one value in a message
# integers of as many bytes, to read the bits of a number
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
BLOCKS = 4093  # of a parameter's bits, in a checksum of it


def meet(world: World, model: nn.Module, run: Run | None, given: Mapping[str, Any]) -> None:
    """Compare what the processes are about to do; number the call, as all of them do.

    Buffers differ in the middle of an epoch, and after a fit that has failed: in training each
    process counts its own rows in them. Then all use those of rank 0.

    Raises:
        ValueError: something differs; the message names what, and in which process.
    """
    facts = facts_of(model, run, given)
    sums: list[int] = []
    sums_of_buffers: list[int] = []
    if run is not None:
        facts["compiled since the last call"] = str(not world.has_shared)
        if world.has_shared:  # else all get the weights and buffers of rank 0 now
            sums = weight_sums(model, run)
            sums_of_buffers = buffer_sums(model, run)
    data = divided_data(given)
    numbers: list[float] = []
    for code in (
        checksum_of(facts),
        zlib.crc32(repr(sums).encode()),
        zlib.crc32(repr([source.code() for source in data.values()]).encode()),
        zlib.crc32(repr(sums_of_buffers).encode()),
    ):
        numbers += code, -code
    begun = world.channel.sums_begun
    most = world.agree(*numbers, verbs_met() + 1, begun, -begun, about="beginning")
    count_verb(world.channel, most[8])
    # buffers that differ are sent below, after the sums that are on their way
    if VERBS[-1].name not in WITHOUT_SUMS or most[6] != -most[7]:
        world.channel.check_sums(most[9], -most[10])
    if most[0] != -most[1]:
        raise_difference(world, facts)
    if run is not None and most[2] != -most[3]:
        raise_drift(world, model, run, sums, "before this call")
    if most[4] != -most[5]:
        for name, source in data.items():
            source.check_same(name)
    if run is not None and most[6] != -most[7]:
        share_buffers(world, model, run)


def share_buffers(world: World, model: nn.Module, run: Run) -> None:
    """Give all processes the buffers of rank 0; in a fit only until the current call ends.

    A callback may evaluate in the middle of an epoch, which must not change the training.
    """
    if run.fit is not None:
        VERBS[-1].put_back = remember_buffers(model, run.loss_func)
    world.share([buffer.data for buffer in buffers_of(model, run.loss_func)])


def divided_data(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of which each process takes a share; it may be in what limits a pass."""
    data = {}
    for name, source in given.items():
        while source is not None:
            if hasattr(source, "check_same"):
                data[name] = source
                break
            source = getattr(source, "batches", None)
    return data


def check_settings(world: World, model: nn.Module, run: Run, *numbers: float) -> None:
    """Raise the error for settings that differ.

    Args:
        numbers: the largest, over all processes, of their `code_of_settings` and its negative.

    Raises:
        ValueError: a setting differs; the message names which, and in which process.
    """
    if numbers[0] != -numbers[1]:
        raise_difference(world, settings_of(model, run), during=True)


def check_weights(world: World, model: nn.Module, run: Run, *numbers: float) -> None:
    """Raise the error for weights that differ.

    Args:
        numbers: the largest, over all processes, of their `code_of_weights` and its negative.

    Raises:
        ValueError: a parameter differs; the message names the first, and in which process.
    """
    if numbers[0] != -numbers[1]:
        raise_drift(world, model, run, weight_sums(model, run), "in this epoch")


def code_of_settings(model: nn.Module, run: Run) -> int:
    """Compute a checksum of the learning rates and of what is frozen; waits for no device."""
    values: list[Any] = [parameter.requires_grad for parameter in model.parameters()]
    for optimizer in run.optimizers.values():
        for group in optimizer.param_groups:
            values.append(shown_setting(group.get("lr")))
    return zlib.crc32(repr(values).encode())


def code_of_weights(model: nn.Module, run: Run) -> int:
    """Compute a checksum of all whole parameters, in one pass over them."""
    return zlib.crc32(repr(weight_sums(model, run)).encode())


# --- facts ----------------------------------------------------------------------------------------


def facts_of(model: nn.Module, run: Run | None, given: Mapping[str, Any]) -> Facts:
    """Return what must be the same in all processes: name -> value, both for people."""
    facts: Facts = {"the model's class": type(model).__name__}
    for name, value in given.items():
        facts |= facts_of_argument(name, value)
    facts |= facts_of_tensors("parameter", model.named_parameters())
    facts |= facts_of_tensors("buffer", model.named_buffers())
    facts |= facts_of_layers(model)
    if run is None:
        return facts
    facts["device"] = run.device.type
    facts["epochs in the history"] = str(len(run.epochs))
    facts["loss_func"] = name_of(run.loss_func)
    if isinstance(run.loss_func, nn.Module):
        facts |= facts_of_tensors("parameter of the loss", run.loss_func.named_parameters())
    facts["loss and metrics_dict"] = ", ".join(run.train.totals.names)
    for name, value in run.options.items():
        if name != "device":  # each process may be given its own
            facts[f"compile's {name}"] = shown(value)
    return facts | settings_of(model, run)


def settings_of(model: nn.Module, run: Run) -> Facts:
    """Return which parameters are frozen, and the optimizers' settings."""
    facts: Facts = {}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
        facts[f"requires_grad of {name}"] = str(parameter.requires_grad)
    for key, optimizer in run.optimizers.items():
        title = f"optimizer {key!r}" if key else "the optimizer"
        facts[f"the class of {title}"] = type(optimizer).__name__
        facts[f"groups of {title}"] = str(len(optimizer.param_groups))
        for number, group in enumerate(optimizer.param_groups):
            where = f"{title}, group {number}" if number else title
            trained = [names.get(id(parameter), "?") for parameter in group["params"]]
            facts[f"parameters in {where}"] = f"{len(trained)}: {', '.join(trained)}"
            for setting, value in group.items():
                if setting != "params":
                    facts[f"{setting} of {where}"] = shown_setting(value)
    return facts


def facts_of_argument(name: str, value: Any) -> Facts:
    """Return what is compared of an argument: a plain value, or the kind and length of data."""
    if not name.startswith("dl"):
        return {name: shown(value)}
    source = getattr(value, "loader", value)  # what the user passed
    facts = {name: MISSING if source is None else type(source).__name__}
    if hasattr(source, "batch_size"):
        facts[f"batch_size of {name}"] = shown(source.batch_size)
    if hasattr(value, "by_rows"):  # shared out by rows or by batches: all have the same
        facts[f"batches in {name}"] = str(find_length(value))
    return facts


def facts_of_layers(model: nn.Module) -> Facts:
    """Return the layers by name; of those of torch their settings as well, and who is in eval."""
    facts = {}
    for name, module in model.named_modules():
        if name:
            settings = ""
            if type(module).__module__.startswith("torch.nn"):
                settings = module.extra_repr()
            facts[f"layer {name}"] = f"{type(module).__name__}({settings})"
    return facts


def facts_of_tensors(kind: str, named: Iterable[tuple[str, Tensor]]) -> Facts:
    """Return names, shapes, types and layouts, by position: gradients are sent in this order."""
    facts = {}
    for number, (name, tensor) in enumerate(named, start=1):
        if is_lazy(tensor):
            facts[f"{kind} {number}"] = f"{name} without a shape"
            continue
        text = f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.layout is torch.strided and not is_sharded(tensor):
            if not tensor.is_contiguous():
                text += f" strides {tensor.stride()}"
        facts[f"{kind} {number}"] = text
    return facts


def shown(value: Any) -> str:
    """Return a value as text that is the same in all processes."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, Mapping | list | tuple) and not value:
        return MISSING
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(item)}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(sorted(map(shown, value)))
    return name_of(value)


def shown_setting(value: Any) -> str:
    """Return a setting of an optimizer as text; a tensor on a device is not waited for."""
    if isinstance(value, Tensor):
        return repr(value.tolist()) if value.device.type == "cpu" else "a tensor"
    if isinstance(value, tuple | list):
        return ", ".join(map(shown_setting, value))
    return shown(value)


def name_of(value: Any) -> str:
    """Name a function, a class or the class of an object, without its place in memory."""
    if isinstance(value, partial):
        return f"partial({name_of(value.func)})"
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def checksum_of(facts: Facts) -> int:
    """Compute a checksum of facts."""
    return zlib.crc32(repr(facts).encode())


# --- weights --------------------------------------------------------------------------------------


def named_weights(model: nn.Module, run: Run) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that each process has whole, of the model and of the loss.

    No buffers: each process counts its own rows in them, until the end of the training pass.
    """
    named = [("", model)]
    if isinstance(run.loss_func, nn.Module):
        named.append(("loss_func.", run.loss_func))
    seen = set()
    for prefix, module in named:
        for name, parameter in module.named_parameters():
            if parameter in seen or is_sharded(parameter) or is_lazy(parameter):
                continue
            seen.add(parameter)
            if parameter.layout is torch.strided:
                yield prefix + name, parameter


def weight_sums(model: nn.Module, run: Run) -> list[int]:
    """Return a checksum of the bits of each parameter; the device is waited for once."""
    return sums_of(parameter for _, parameter in named_weights(model, run))


def buffer_sums(model: nn.Module, run: Run) -> list[int]:
    """Return a checksum of the bits of each buffer that each process has whole."""
    buffers = []
    for buffer in buffers_of(model, run.loss_func):
        is_plain = buffer.layout is torch.strided and not buffer.is_quantized
        if is_plain and not (buffer.is_nested or is_sharded(buffer) or is_lazy(buffer)):
            buffers.append(buffer)
    return sums_of(buffers)


@torch.no_grad()
def sums_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return a checksum of the bits of each tensor; the device is waited for once."""
    sums: list[Tensor] = []
    factors: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        if tensor.device not in factors:
            factors[tensor.device] = factors_of_blocks().to(tensor.device)
        sums.append(sum_of_bits(tensor.detach(), factors[tensor.device]))
    if not sums:
        return []
    found: list[int] = torch.stack([value.to(sums[0].device) for value in sums]).tolist()
    return found


def sum_of_bits(numbers: Tensor, factors: Tensor) -> Tensor:
    """Add up the bits of numbers as integers, in blocks, each times a factor of its own.

    So rows in another order have another sum. An overflow is the same in all processes.
    """
    bits = as_integers(numbers)
    length = len(bits) // len(factors)  # of a block
    begin = length * len(factors)
    rest = (bits[begin:] * factors[: len(bits) - begin]).sum()
    if not length:
        return rest
    return (bits[:begin].view(-1, length).sum(1, dtype=torch.int64) * factors).sum() + rest


def factors_of_blocks() -> Tensor:
    """Return odd numbers that are the same everywhere, (blocks,) int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2**62, (BLOCKS,), generator=generator) | 1


def as_integers(numbers: Tensor) -> Tensor:
    """Return the bits of numbers as integers, (n,), of 8 bytes where that goes: fastest to add.

    Of numbers of 8 bytes it does not: the sign would be the highest bit of a sum, where two that
    change cancel each other out.
    """
    if numbers.is_complex():
        numbers = torch.view_as_real(numbers.resolve_conj())
    size = numbers.element_size()
    flat = numbers.reshape(-1)
    if size == 8:
        return flat.view(torch.int32)
    begin, length = flat.storage_offset() * size, flat.numel() * size
    if begin % 8 == 0 and length % 8 == 0:
        return flat.view(torch.int64)
    return flat.view(INTEGERS[size])


# --- errors ---------------------------------------------------------------------------------------


def raise_difference(world: World, facts: Facts, during: bool = False) -> None:
    """Raise the error that names what differs, and in which process."""
    gathered = world.gather(facts) or []
    names: dict[str, None] = {}
    for others in gathered:
        names.update(dict.fromkeys(others))
    differences = []
    for name in names:
        values = [others.get(name, MISSING) for others in gathered]
        if len(set(values)) > 1:
            differences.append(f"{name} is {by_value(shortened(values))}")
    if len(differences) > SHOWN:
        differences[SHOWN:] = [f"and {len(differences) - SHOWN} more differ"]
    what = "the processes have been given different things"
    remedy = (
        "Build, compile and call the model alike in every process: each takes its own share of "
        "the same data, and gradients are added up parameter by parameter."
    )
    if during:
        what = "the processes have come to differ in this fit"
        remedy = (
            "A callback or step has set it in one process alone, or by a value that differs "
            "between processes, such as the running means of on_batch_end. Set it in every process "
            "alike, by a value of the epoch's logs in on_epoch_end."
        )
    raise ValueError(f"{what}: {'; '.join(differences)}. {remedy}")


def raise_drift(world: World, model: nn.Module, run: Run, sums: list[int], when: str) -> None:
    """Raise the error that names the first parameter that differs, and in which process."""
    names = []
    norms = []
    for name, parameter in named_weights(model, run):
        names.append(name)
        norms.append(float(torch.linalg.vector_norm(parameter.detach().to("cpu"))))
    gathered = world.gather([sums, norms]) or []
    differing = []
    for number, name in enumerate(names):
        if len({others[0][number] for others in gathered}) > 1:
            differing.append((number, name))
    number, name = differing[0]
    shown_norms = [f"norm {others[1][number]:.9g}" for others in gathered]
    if len(set(shown_norms)) == 1:  # such as the same numbers in another order
        shown_norms = [f"{shown_norms[0]}, checksum {others[0][number]}" for others in gathered]
    more = ""
    if len(differing) > 1:
        more = f" {len(differing) - 1} more parameters differ."
    raise ValueError(
        f"the weights of the processes have come to differ {when}: parameter {name} has "
        f"{by_value(shown_norms)}.{more} Something has changed it in one process alone, or with "
        "random numbers of its own, such as code under `if model.is_main_process`, an unseeded "
        "reset of a layer, or load in one process. Do it in every process with the same seed, or "
        "send rank 0's with torch.distributed.broadcast."
    )


def shortened(values: list[str]) -> list[str]:
    """Return values that differ, long ones from shortly before their first difference."""
    if max(map(len, values)) <= LONGEST:
        return values
    common = 0
    for letters in zip(*values, strict=False):
        if len(set(letters)) > 1:
            break
        common += 1
    start = max(common - LONGEST // 4, 0)
    parts = []
    for value in values:
        part = value[start : start + LONGEST]
        before = "... " if start else ""
        after = " ..." if len(value) > start + LONGEST else ""
        parts.append(f"{before}{part}{after}")
    return parts
