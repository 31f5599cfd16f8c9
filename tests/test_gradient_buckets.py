"""The messages in which several processes average their gradients: what is in them, and when."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import minikeras
from minikeras.distributed import gradients
from minikeras.distributed.all_reduce import AllReduce
from minikeras.distributed.gradients import Layout, make_buckets
from minikeras.processes import OneProcess

MIB = 2**20


class Watched(OneProcess):
    """One process that notes what it sends, and when gradients arrive."""

    def __init__(self):
        self.log = []

    def begin_sum(self, flat):
        self.log.append(("sent", flat.numel() * flat.element_size()))
        return SimpleNamespace(wait=lambda: None, is_completed=lambda: True)

    def wait_for_sum(self, work, flat):
        work.wait()

    def early(self):
        """Return the share of bytes that was sent before the last gradient arrived."""
        last = max(number for number, (what, _) in enumerate(self.log) if what == "arrived")
        sent = [(number, size) for number, (what, size) in enumerate(self.log) if what == "sent"]
        return sum(size for number, size in sent if number < last) / sum(size for _, size in sent)


class Chain(nn.Module):
    """Layers of 1 MiB, called by number, registered in this order or the other way round."""

    def __init__(self, layers, registered="in order", unused=0):
        super().__init__()
        order = range(layers) if registered == "in order" else reversed(range(layers))
        for number in order:
            self.add_module(f"layer{number}", nn.Linear(512, 512, bias=False))
        self.unused = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(unused))
        self.layers = layers

    def forward(self, x):
        for number in range(self.layers):
            x = getattr(self, f"layer{number}")(x)
        return x


def sent_by(net, batches=4, **compiled_with):
    """Train a network as one of several processes does; return what was noted in the last batch."""
    world = Watched()
    model = minikeras.Model(net)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: world.log.append(("arrived", 0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.compile(nn.MSELoss(), optimizer, device="cpu", **compiled_with)
    model._run.stepper.compiled_parts.append(AllReduce(world))
    X = torch.randn(2 * batches, 512)
    forget = minikeras.LambdaCallback(
        on_batch_end=lambda batch, logs: world.log.clear() if batch < batches else None
    )
    model.fit(1, (X, X), batch_size=2, verbose=0, callbacks=[forget])
    return world


@pytest.mark.parametrize(
    ("layers", "registered", "unused", "least"),
    [  # the shares of DistributedDataParallel, the larger of 8 and of 25 MiB a bucket
        (24, "in order", 0, 0.67),
        (24, "the other way round", 0, 0.67),
        (24, "in order", 1, 0.96),
        (7, "in order", 0, 0.14),
        (60, "in order", 0, 0.93),
    ],
)
def test_buckets_are_sent_while_backward_runs(layers, registered, unused, least):
    net = Chain(layers, registered, unused)
    world = sent_by(net)
    assert world.early() >= min(least, (layers - 1) / layers) - 1e-3
    sizes = [size for what, size in world.log if what == "sent"]
    assert sizes[0] < 1.1 * MIB  # sending begins early
    assert max(sizes) < 25.1 * MIB
    assert sum(sizes) < (layers + 0.01) * MIB  # nothing is sent for a layer without a gradient


def test_buckets_of_accumulated_gradients_are_sent_in_the_last_backward_of_a_window():
    world = sent_by(Chain(4), accumulate=4)
    assert world.early() > 0.7
    assert len([size for what, size in world.log if what == "sent"]) == 3


def test_buckets_of_a_small_network_are_one():
    assert len([size for what, size in sent_by(nn.Linear(512, 512)).log if what == "sent"]) == 1


def test_a_gradient_is_let_go_as_its_bucket_is_sent_and_then_lies_in_the_memory_of_the_bucket():
    layers = [nn.Linear(8, 8) for _ in range(3)]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    order = {parameter: number for number, parameter in enumerate(net.parameters())}
    (bucket,) = make_buckets(dict.fromkeys(net.parameters(), optimizer), order)
    net(torch.ones(1, 8)).sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    sums = gradients.GradientSums(Watched(), [bucket])
    at_sending = []
    sums.world.begin_sum = lambda flat: (
        at_sending.extend(parameter.grad for parameter in net.parameters())
        or SimpleNamespace(wait=lambda: None, is_completed=lambda: True)
    )
    assert sums.finish(3, torch.tensor(4.0)) == [3.0, 4.0]
    assert at_sending == [None] * 6
    memory = bucket.gradient_memory()
    begin = memory.data_ptr()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert begin <= parameter.grad.data_ptr() < begin + 4 * memory.numel()
    net[0].weight.grad = net[0].weight.grad.clone()
    assert bucket.gradient_memory() is None


@pytest.mark.parametrize("size", [10, 2**17])
def test_memory_of_a_message_is_used_again_but_not_while_the_user_keeps_a_part_of_it(size):
    memory = gradients.Memory(torch.device("cpu"), torch.float32)
    address = memory.message_of(size).data_ptr()
    memory.note_sent(SimpleNamespace(is_completed=lambda: True))
    assert memory.lend(memory.message).data_ptr() == address  # and let go of at once
    assert memory.message_of(size).fill_(2).data_ptr() == address
    kept = memory.lend(memory.message).detach()[5:].view(-1)
    assert memory.message_of(size).fill_(3).data_ptr() != address
    assert torch.equal(kept, torch.full((size - 5,), 2.0))


def test_memory_of_a_message_is_not_used_again_while_it_is_being_sent():
    memory = gradients.Memory(torch.device("cpu"), torch.float32)
    address = memory.message_of(10).data_ptr()
    kept = memory.message
    memory.note_sent(SimpleNamespace(is_completed=lambda: False))
    assert memory.message_of(10).data_ptr() != address
    assert kept.data_ptr() == address


def test_gradients_that_a_hook_of_the_optimizer_keeps_stay_as_they_are():
    kept, copies = [], []
    net = nn.Linear(64, 64)

    def keep(optimizer, args, kwargs):
        if len(copies) < 3:
            kept.append(net.weight.grad.detach()[1:])
            copies.append(net.weight.grad[1:].clone())

    model = minikeras.Model(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(keep)
    model.compile(nn.MSELoss(), optimizer, device="cpu")
    model._run.stepper.compiled_parts.append(AllReduce(Watched()))
    X = torch.randn(40, 64)
    model.fit(1, (X, X), batch_size=4, verbose=0)
    assert len(kept) == 3
    for gradient, copied in zip(kept, copies, strict=True):
        assert torch.equal(gradient, copied)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_layer_without_a_gradient_in_the_first_step_is_sent_only_if_a_process_has_one(processes):
    layers = [nn.Linear(4, 4) for _ in range(2)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    order = {parameter: number for number, parameter in enumerate(layers[0].parameters())}
    buckets = make_buckets(dict.fromkeys(parameters, optimizer), order, set(parameters))
    world = Watched()
    sums = gradients.GradientSums(world, buckets)
    layers[processes](layers[0](torch.ones(1, 4))).sum().backward()
    expected = [parameter.grad for parameter in parameters]
    assert sums.finish(5.0) == [5.0]
    assert [size for _, size in world.log] == [4 * (20 + 2 + 2), 4 * (20 + 2)][: processes + 1]
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_a_layer_that_is_used_again_is_sent_with_the_others_from_the_next_fit_on():
    class Skips(Chain):
        def forward(self, x):
            return super().forward(x) if self.layers else self.layer0(x)

    net = Skips(3)
    net.layers = 0
    world = Watched()
    model = minikeras.Model(net)
    model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=1e-3), device="cpu")
    model._run.stepper.compiled_parts.append(AllReduce(world))
    X = torch.randn(4, 512)
    sent = []
    for layers in (0, 3, 3):
        net.layers = layers  # 0: the first one alone
        world.log.clear()
        model.fit(1, (X, X), batch_size=2, verbose=0)
        sent.append([round(size / MIB) for _, size in world.log])
    assert sent == [[1, 1, 1, 1], [1] * 6, [1] * 6]


def test_memory_is_kept_for_the_layers_alone_that_are_trained_now():
    net = Chain(3)
    model = minikeras.Model(net)
    model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=1e-3), device="cpu")
    part = AllReduce(Watched())
    model._run.stepper.compiled_parts.append(part)
    kept = []

    def freeze_others(batch, logs):
        for number in range(2):
            getattr(net, f"layer{number}").requires_grad_(bool(batch >> number & 1))
        arrays = [bucket.memory.array for buckets in part.kept.values() for bucket in buckets]
        kept.append(sum(array.nbytes for array in arrays))

    X = torch.randn(16, 512)
    callback = minikeras.LambdaCallback(on_batch_end=freeze_others)
    model.fit(1, (X, X), batch_size=2, verbose=0, callbacks=[callback])
    assert len(kept) == 8
    assert max(kept) < 3.1 * MIB


def test_buckets_of_optimizers_that_take_turns_among_the_layers_stay_few():
    layers = [nn.Linear(512, 512) for _ in range(20)]
    optimizers = [
        torch.optim.SGD([layer.weight for layer in layers]),
        torch.optim.SGD([layer.bias for layer in layers]),
    ]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    order = {parameter: number for number, parameter in enumerate(parameters)}
    owners = {layer.weight: optimizers[0] for layer in layers}
    owners |= {layer.bias: optimizers[1] for layer in layers}
    buckets = make_buckets(owners, order)
    assert len(buckets) <= 7
    found = [parameter for bucket in buckets for parameter in bucket.parameters]
    assert sorted(map(id, found)) == sorted(map(id, parameters))


LAYOUTS = {
    "a vector": torch.randn(5),
    "a number": torch.randn(()),
    "empty": torch.randn(3, 0),
    "contiguous": torch.randn(4, 3, 2),
    "transposed": torch.randn(4, 3).t(),
    "channels_last": torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last),
    "channels_last, 1 x 1": torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
    "channels_last of one channel": torch.randn(4, 1, 3, 3).to(memory_format=torch.channels_last),
    "channels_last_3d": torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "permuted": torch.randn(2, 3, 4, 5).permute(2, 0, 3, 1),
    "complex": torch.randn(3, 2, dtype=torch.complex64),
    "complex, transposed": torch.randn(3, 2, dtype=torch.complex128).t(),
    "half": torch.randn(3, 2).bfloat16(),
    "with gaps": torch.randn(4, 6)[:, ::2],
    "expanded": torch.randn(4, 1).expand(4, 3),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_get_the_layout_of_their_parameter(name):
    parameter = LAYOUTS[name]
    layout = Layout(parameter)
    has_gaps = name in ("with gaps", "expanded")
    for gradient in (parameter.contiguous(), parameter.clone(), -parameter):
        numbers = layout.flatten(gradient).clone()
        assert numbers.ndim == 1
        found = layout.unflatten(numbers, 0)
        assert torch.equal(found, gradient)
        assert found.dtype == parameter.dtype
        if has_gaps:
            assert found.is_contiguous()
        else:
            assert found.stride() == parameter.stride()
