"""The loss of training is torch's own cross-entropy, also as it is written for the compiler."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table

from llmslm.data.codec import IGNORED
from llmslm.target_logits import cross_entropy

smoothed = pytest.mark.parametrize("smoothing", [0.0, 0.1])


@pytest.fixture(params=["eager", "compiled"])
def entropy(request):
    torch.compiler.reset()
    return cross_entropy if request.param == "eager" else torch.compile(cross_entropy, backend="eager", fullgraph=True)


def batch(dtype, top=0.0):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(32, 3000, generator=generator) + top
    targets = torch.randint(3000, (32,), generator=generator)
    targets[::5] = IGNORED
    return logits.to(dtype).requires_grad_(), targets


def exact(logits, targets, smoothing):
    """Value and gradient of torch's in float64."""
    logits = logits.detach().double().requires_grad_()
    value = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    value.backward()
    return value.float(), logits.grad


@smoothed
@pytest.mark.parametrize("top", [0.0, -300.0])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-3)])
def test_value_and_gradient_are_those_in_float64(entropy, smoothing, top, dtype, bar):
    logits, targets = batch(dtype, top)
    value, gradient = exact(logits, targets, smoothing)
    found = entropy(logits, targets, smoothing)
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
    assert (logits.grad.double() - gradient).norm() < bar * gradient.norm()
    assert not logits.grad[::5].any()


def test_words_that_are_ruled_out_have_no_part_in_it(entropy):
    logits, targets = batch(torch.float32)
    allowed = logits.detach()[:, :2999].clone()
    ruled_out = torch.nn.functional.pad(allowed, (0, 1), value=-torch.inf)
    targets[targets == 2999] = IGNORED
    torch.testing.assert_close(entropy(ruled_out, targets), entropy(allowed, targets))
    assert entropy(ruled_out, targets, 0.1) == torch.inf  # of which they have a share


@smoothed
def test_no_counted_target_gives_no_number(entropy, smoothing):
    logits, targets = batch(torch.float32)
    assert entropy(logits, targets.fill_(IGNORED), smoothing).isnan()


@smoothed
def test_the_compiled_backward_is_one_element_wise_kernel(smoothing):
    """Where it sums over the vocabulary, the compiler may store what it sums, in float32."""
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
    logits, targets = batch(torch.bfloat16)
    torch.compile(cross_entropy, backend=backend)(logits, targets, smoothing).backward()
    nodes = [node for node in graphs[1].graph.nodes if node.op == "call_function"]
    assert sum(node.meta["val"].shape == logits.shape for node in nodes) > 1
    for node in nodes:
        if any(read.meta["val"].shape == logits.shape for read in node.all_input_nodes):
            assert node.meta["val"].shape == logits.shape
