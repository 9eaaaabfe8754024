"""Where a graph reads its inputs: each on its place, and what comes from the host by one copy a dtype."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmslm.generation.graphs import Places

IDS, MASK, SPANS = torch.arange(6).view(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.arange(12).view(2, 3, 2)
STATES, START = torch.randn(2, 3, 4), torch.tensor([[7], [8]])
INPUTS = (IDS, STATES, MASK, START, SPANS)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


class Copies(TorchDispatchMode):
    """Notes the elements of each copy."""

    def __init__(self):
        super().__init__()
        self.of = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "copy_":
            self.of.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_inference", [False, True])
def test_each_input_is_on_its_place(device, in_inference):
    places = Places(INPUTS, torch.device(device))
    with torch.inference_mode(in_inference):
        for factor in (1, 3):
            inputs = [factor * value for value in INPUTS]
            places.fill(inputs)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(places.tensors, inputs, strict=True))
    assert not any(place.is_inference() for place in places.tensors)


def test_what_comes_from_the_host_is_copied_at_once():
    places = Places(INPUTS, torch.device("meta"))
    with Copies() as copies:
        places.fill(INPUTS)
    assert copies.of == [4 * 16, STATES.numel()]  # whole numbers of what kernels read at once
    assert all(place.storage_offset() % 16 == 0 for place in places.tensors)


def test_what_is_there_already_is_copied_alone():
    there = [value.to("meta") for value in INPUTS]
    with Copies() as copies:
        Places(INPUTS, torch.device("meta")).fill([*there[:3], *INPUTS[3:]])
        Places(there, torch.device("meta")).fill(INPUTS)
        Places([IDS], torch.device("meta")).fill([IDS])
    sizes = [value.numel() for value in INPUTS]
    assert sorted(copies.of) == sorted([*sizes, *sizes, IDS.numel()])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_inputs_of_the_host_and_of_the_device_mix():
    device = torch.device("cuda")
    for made_of in (INPUTS, [value.to(device) for value in INPUTS]):
        places = Places(made_of, device)
        for on_device in ((), (0,), (1, 4), range(5)):
            inputs = [value.to(device) if number in on_device else value for number, value in enumerate(INPUTS)]
            for tensor in places.tensors:
                tensor.zero_()
            places.fill(inputs)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(places.tensors, INPUTS, strict=True))
