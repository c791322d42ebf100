"""The prefix network once per step: the same gradients as a run per micro-batch, and nothing kept between steps."""

import torch

from prefixlib.compute.accumulation import OncePerStep


class Prefix(torch.nn.Module):
    """Has a `flat`, as the prefixes of both trees have: one tensor, or several by name."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def flat(self):
        return self.make()


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6)).double()


def test_gradients_of_three_micro_batches_equal_those_of_three_runs():
    inputs = torch.randn(5, 4, dtype=torch.double)
    weights = torch.randn(3, 5, 6, dtype=torch.double)
    apart, shared = network(), network()
    prefix = Prefix(lambda: shared(inputs))
    once = OncePerStep(prefix)
    runs = []
    shared.register_forward_hook(lambda *_: runs.append(1))
    for step in range(2):  # the second starts from nothing
        for weight in weights:
            (apart(inputs) * weight).tanh().sum().backward()
            (prefix.flat() * weight).tanh().sum().backward()
        assert all(parameter.grad is None for parameter in shared.parameters())
        once.backward()
        assert len(runs) == step + 1
        for one, other in zip(apart.parameters(), shared.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        apart.zero_grad()
        shared.zero_grad()


def test_a_tensor_that_no_loss_reached_is_left_alone():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    prefix = Prefix(lambda: {"used": used * 2, "unused": unused * 2})
    once = OncePerStep(prefix)
    prefix.flat()["used"].sum().backward()
    once.backward()
    assert used.grad.tolist() == [2.0, 2.0]
    assert unused.grad is None


def test_gradients_add_up_in_float32_under_autocast():
    """1024 parts of 1/256: bfloat16, with its 8 bits, would stop adding at a sum of 1."""
    weight = torch.ones(3, requires_grad=True)
    prefix = Prefix(lambda: (weight * 1).bfloat16())
    once = OncePerStep(prefix)
    for _ in range(1024):
        shared = prefix.flat()
        (shared * (1 / 256)).sum().backward()
    once.backward()
    assert weight.grad.tolist() == [4.0, 4.0, 4.0]


def test_removed_the_module_computes_for_itself_again():
    prefix = Prefix(lambda: torch.ones(1, requires_grad=True) * 2)
    OncePerStep(prefix)
    assert prefix.flat() is prefix.flat()
    OncePerStep.remove(prefix)
    assert prefix.flat() is not prefix.flat()
