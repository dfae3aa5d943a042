"""LARS against the authors' numbers and against its own plain loop; the moving average."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from byol_fast.model import BYOL
from byol_fast.optim import LARS, ema_, param_groups, set_lr
from tests.byol_fast import fake_amp_c

IMPLS = ["reference", "foreach", "apex"]


@pytest.fixture(autouse=True)
def apex_without_apex(monkeypatch):
    """`impl="apex"` against a stand-in for its compiled module; on a GPU with apex see below."""
    monkeypatch.setitem(sys.modules, "amp_C", fake_amp_c)
    monkeypatch.delitem(sys.modules, "byol_fast.updates.apex_update", raising=False)


def two_steps(p, grads, *, tensor_lr=False, adapt=True, **options):
    p = nn.Parameter(torch.tensor(p))
    lr = torch.tensor(0.0) if tensor_lr else 0.0
    optimizer = LARS([{"params": [p], "adapt": adapt}], lr=lr, **options)
    seen = []
    for rate, grad in zip((1.0, 2.0), grads, strict=True):
        set_lr(optimizer, rate)
        p.grad = torch.tensor(grad)
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tensor_lr", [False, True])
class TestGolden:
    def test_adapted(self, impl, tensor_lr):
        first, second = two_steps(
            [[3.0, 4.0]],
            ([[0.6, 0.8]], [[0.0, 1.0]]),
            weight_decay=0.1,
            impl=impl,
            tensor_lr=tensor_lr,
        )
        torch.testing.assert_close(first, torch.tensor([[2.997, 3.996]]), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            second, torch.tensor([[2.9895082, 3.9790314]]), rtol=0, atol=1e-6
        )

    def test_sum_norm_with_lr_in_momentum(self, impl, tensor_lr):
        _, second = two_steps(
            [[3.0, 4.0]],
            ([[0.6, 0.8]], [[0.0, 1.0]]),
            weight_decay=0.1,
            impl=impl,
            norm="sum",
            lr_in_momentum=True,
            tensor_lr=tensor_lr,
        )
        torch.testing.assert_close(
            second, torch.tensor([[2.9923033, 3.9830756]]), rtol=0, atol=1e-6
        )

    def test_excluded(self, impl, tensor_lr):
        first, second = two_steps(
            [1.0, -1.0],
            ([0.1, 0.2], [0.1, 0.2]),
            adapt=False,
            impl=impl,
            tensor_lr=tensor_lr,
        )
        torch.testing.assert_close(first, torch.tensor([0.9, -1.2]), rtol=0, atol=1e-6)
        torch.testing.assert_close(second, torch.tensor([0.52, -1.96]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", ["update", "sum"])
def test_zero_norm_means_ratio_one(impl, norm):
    zero_weight, zero_grad = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    zero_weight.grad, zero_grad.grad = torch.full((2, 2), 0.5), torch.zeros(2, 2)
    LARS([zero_weight, zero_grad], lr=1.0, impl=impl, norm=norm).step()
    torch.testing.assert_close(zero_weight.detach(), torch.full((2, 2), -0.5), rtol=0, atol=0)
    torch.testing.assert_close(zero_grad.detach(), torch.ones(2, 2), rtol=0, atol=0)


def test_without_adaptation_it_is_torch_sgd():
    torch.manual_seed(0)
    mine = nn.Linear(5, 3)
    other = copy.deepcopy(mine)
    groups = [{"params": list(mine.parameters()), "adapt": False, "weight_decay": 0.01}]
    pairs = (
        (mine, LARS(groups, lr=0.1)),
        (other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)),
    )
    for _ in range(5):
        x = torch.randn(4, 5)
        for net, optimizer in pairs:
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(mine.weight, other.weight)
    torch.testing.assert_close(mine.bias, other.bias)


def resnet50_shapes(divide: int) -> list[dict]:
    """The two groups of ResNet-50 with heads; every dimension above 16 divided."""
    with torch.device("meta"):
        groups = param_groups(BYOL("resnet50").online, 1.5e-6)
    assert [len(group["params"]) for group in groups] == [57, 112]
    for group in groups:
        shapes = [[n // divide if n > 16 else n for n in p.shape] for p in group["params"]]
        group["params"] = [nn.Parameter(torch.randn(s) * 0.05) for s in shapes]
    return groups


@pytest.mark.parametrize(
    ("divide", "variant"),
    [
        (8, {}),
        (8, {"norm": "sum"}),
        (8, {"norm": "sum", "lr_in_momentum": True}),
        (8, {"lr_in_momentum": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ["foreach", "apex"])
def test_it_equals_the_reference_step_after_step(divide, variant, impl):
    compare(impl, divide, variant, steps=30)


@pytest.mark.slow
def test_it_does_so_on_all_35_million_parameters():
    """Norms over tensors of millions: their sums are where the two may differ by rounding."""
    compare("foreach", 1, {}, steps=3, warmup=1)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["foreach", "apex"])
def test_it_does_so_over_100_steps(impl):
    compare(impl, 8, {}, steps=100)


def compare(impl, divide, variant, *, steps, warmup=10):
    torch.manual_seed(0)
    groups = resnet50_shapes(divide)
    left = [p for group in groups for p in group["params"]]
    twins = copy.deepcopy(groups)
    right = [p for group in twins for p in group["params"]]
    start = [p.detach().clone() for p in left]
    fast = LARS(groups, lr=0.0, impl=impl, **variant)
    plain = LARS(twins, lr=0.0, impl="reference", **variant)
    noise = [torch.randn_like(p) * 1e-3 for p in left]
    for p, q, n in zip(left, right, noise, strict=True):
        p.grad = q.grad = n
    for step in range(steps):
        for optimizer in (fast, plain):
            set_lr(optimizer, 3.2 * min(step / warmup, 1))
            optimizer.step()
        torch._foreach_mul_(noise, -1.1 if step % 4 == 0 else 0.95)  # the next gradients
    for p, q, was in zip(left, right, start, strict=True):
        assert (p - was).abs().max() > 1e-4
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            fast.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"], rtol=0, atol=1e-6
        )


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


HOST_READS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}


def ops_of(call):
    with Recorder() as seen:
        call()
    return seen.names


@pytest.mark.parametrize("variant", [{}, {"norm": "sum", "lr_in_momentum": True}], ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_foreach_reads_nothing_back_in_a_fixed_number_of_calls(variant, tensor_lr):
    lengths = []
    for tensors in (3, 40):
        groups = [
            {"params": [nn.Parameter(torch.randn(4, 3)) for _ in range(tensors)], "adapt": True},
            {"params": [nn.Parameter(torch.randn(4)) for _ in range(tensors)], "adapt": False},
        ]
        for p in (p for g in groups for p in g["params"]):
            p.grad = torch.randn_like(p)
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        optimizer = LARS(groups, lr=lr, weight_decay=0.1, **variant)
        optimizer.step()  # the first makes the buffers, one call each
        names = ops_of(optimizer.step)
        assert not HOST_READS & set(names)
        lengths.append(len(names))
    assert lengths[0] == lengths[1] <= 30


def test_the_recorder_sees_the_reference_reading_back():
    p = nn.Parameter(torch.randn(3, 3))
    p.grad = torch.randn(3, 3)
    assert HOST_READS & set(ops_of(LARS([p], lr=0.1, impl="reference").step))


def trained(optimizer, params, steps=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("first", IMPLS)
@pytest.mark.parametrize("then", IMPLS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_state_dict_round_trip_between_implementations(first, then, tensor_lr, tmp_path):
    torch.manual_seed(0)
    start = torch.randn(4, 3)

    def make(impl, lr):
        p = nn.Parameter(start.clone())
        return [p], LARS([p], lr=torch.tensor(lr) if tensor_lr else lr, weight_decay=0.1, impl=impl)

    whole, optimizer = make(first, 0.3)
    trained(optimizer, whole)
    torch.save({"p": whole, "o": optimizer.state_dict()}, tmp_path / "state.pt")
    trained(optimizer, whole, seed=2)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, optimizer = make(then, 0.9)
    lr = optimizer.param_groups[0]["lr"]
    resumed[0].data.copy_(saved["p"][0])
    optimizer.load_state_dict(saved["o"])
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.3)
    if tensor_lr:
        assert optimizer.param_groups[0]["lr"] is lr  # the tensor a graph may hold
    trained(optimizer, resumed, seed=2)
    exact = first == then
    torch.testing.assert_close(
        resumed[0], whole[0], rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6
    )


@pytest.mark.parametrize("impl", ["foreach", "reference"])
def test_a_copy_goes_on_as_the_original(impl):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = LARS(net.parameters(), lr=0.1, impl=impl, norm="sum", lr_in_momentum=True)

    def train(net, optimizer):
        optimizer.zero_grad()
        net(torch.ones(2, 4).cumsum(0)).square().sum().backward()
        optimizer.step()
        return [p.detach().clone() for p in net.parameters()]

    train(net, optimizer)
    copies = copy.deepcopy((net, optimizer))
    for ours, theirs in zip(train(net, optimizer), train(*copies), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_parameters_without_gradient_are_left_alone(impl):
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([used, unused], lr=0.1, weight_decay=0.1, impl=impl)
    used.grad = torch.ones(2, 2)
    optimizer.step()
    assert (unused == 1).all() and (used != 1).all()
    assert unused not in optimizer.state
    LARS([unused], lr=0.1, impl=impl).step()  # none at all


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert (p < 1).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_not_changed(impl):
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.full((2, 2), 0.5)
    LARS([p], lr=0.1, weight_decay=0.5, impl=impl).step()
    assert (p.grad == 0.5).all()  # the monitor reads their norm after the step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": torch.ones(1)}, "0-d"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay"),
        ({"lr": 0.1, "weight_decay": float("nan")}, "weight_decay"),
        ({"lr": 0.1, "eta": 0.0}, "eta"),
        ({"lr": 0.1, "eta": float("inf")}, "eta"),
        ({"lr": 0.1, "impl": "cuda"}, "impl"),
        ({"lr": 0.1, "norm": "max"}, "norm"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LARS([nn.Parameter(torch.ones(1))], **options)


def test_param_groups_leave_out_biases_and_all_norms():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm((4, 2, 2)), nn.Linear(4, 2)
    )
    net[0].bias.requires_grad_(False)
    adapted, excluded = param_groups(net, 0.5)
    assert [id(p) for p in adapted["params"]] == [id(net[0].weight), id(net[3].weight)]
    assert adapted["weight_decay"] == 0.5 and adapted["adapt"] is True
    # LayerNorm's weight has three dimensions and is a norm all the same
    want = [*net[1].parameters(), *net[2].parameters(), net[3].bias]
    assert [id(p) for p in excluded["params"]] == [id(p) for p in want]
    assert excluded["weight_decay"] == 0.0 and excluded["adapt"] is False
    assert param_groups(net, 0.5, adapt=False)[0]["adapt"] is False
    assert len(param_groups(nn.BatchNorm1d(3), 0.5)) == 1


@pytest.mark.parametrize("as_tensor", [False, True])
def test_ema(as_tensor):
    torch.manual_seed(0)
    target = [torch.randn(3, 2), torch.randn(4)]
    online = [torch.randn(3, 2), torch.randn(4)]
    decay = 0.996
    want = [decay * t + (1 - decay) * o for t, o in zip(target, online, strict=True)]
    addresses = [t.data_ptr() for t in target]
    kept = [o.clone() for o in online]
    names = ops_of(lambda: ema_(target, online, torch.tensor(decay) if as_tensor else decay))
    assert not HOST_READS & set(names) and len(names) <= 6
    for t, w, o, k in zip(target, want, online, kept, strict=True):
        torch.testing.assert_close(t, w, rtol=0, atol=1e-6)
        assert torch.equal(o, k)
    assert [t.data_ptr() for t in target] == addresses
    ema_([], [], torch.tensor(decay) if as_tensor else decay)  # SimSiam has no target


@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_ema_ends(decay, as_tensor):
    target, online = [torch.randn(5)], [torch.randn(5)]
    before = target[0].clone()
    ema_(target, online, torch.tensor(decay) if as_tensor else decay)
    torch.testing.assert_close(target[0], online[0] if decay == 0 else before)


def test_apex_missing_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(ImportError, match="built from source"):
        LARS([nn.Parameter(torch.ones(2))], lr=0.1, impl="apex")


def test_step_and_average_is_the_step_and_then_the_average():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 4))
    q, t, u = copy.deepcopy(p), torch.zeros(4, 4), torch.zeros(4, 4)
    p.grad = q.grad = torch.randn(4, 4)
    LARS([p], lr=0.5, weight_decay=0.1).step_and_average([t], [p], 0.9)
    LARS([q], lr=0.5, weight_decay=0.1).step()
    ema_([u], [q], 0.9)
    assert torch.equal(p, q) and torch.equal(t, u)
    assert t.abs().sum() > 0
