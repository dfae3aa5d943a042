"""ViewBatchNorm against separate calls of torch's BatchNorm, one per view."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from byol_fast.networks import norm_ops
from byol_fast.norm import ViewBatchNorm, convert, set_sync, set_views

SHAPES = [(3, 5), (7, 16), (1, 4, 3, 3), (5, 8, 6, 7), (4, 3, 9), (2, 4, 3, 3, 2)]  # one view


def plain_norm(channels: int, dims: int) -> nn.Module:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dims]
    norm = kind(channels)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    return norm


def images(views: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(views * shape[0], *shape[1:])
    x += torch.arange(views).repeat_interleave(shape[0]).view(-1, *[1] * (len(shape) - 1))
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.to(dtype).requires_grad_()


def run(norm, x, grad, parts):
    """Outputs, input gradient, weight gradients and running statistics of `parts` calls."""
    leaf = x.detach().clone().requires_grad_()
    out = torch.cat([norm(chunk) for chunk in leaf.chunk(parts)])
    out.backward(grad)
    return out, leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


def assert_all_close(got, wanted, *, rtol=1e-5, atol=1e-5):
    for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.dtype == b.dtype
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=atol, msg=lambda text, number=number: f"item {number}: {text}"
        )


@pytest.fixture(params=["kernels", "formulas"])
def route(request, monkeypatch):
    """Each test runs on the eager kernels and on the formulas that torch.compile sees."""
    if request.param == "formulas":
        monkeypatch.setattr(norm_ops, "_fits_kernels", lambda *_: False)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("views", [2, 3])
def test_equals_one_batchnorm_call_per_view(shape, views, route):
    torch.manual_seed(0)
    if shape == (1, 4, 3, 3) and views == 3:
        shape = (1, 4, 5, 1)
    plain = plain_norm(shape[1], len(shape))
    mine = convert(copy.deepcopy(plain), views=views)
    x = images(views, shape)
    grad = torch.randn_like(x)
    for _ in range(2):  # twice: running statistics pile up
        plain.zero_grad()
        mine.zero_grad()
        assert_all_close(run(mine, x, grad, 1), run(plain, x, grad, views))


def test_views_are_not_mixed():
    torch.manual_seed(0)
    x = images(2, (6, 4, 3, 3))
    out = ViewBatchNorm(4)(x)
    means = out.view(2, 6, 4, 3, 3).mean((1, 3, 4))
    torch.testing.assert_close(means, torch.zeros(2, 4), atol=1e-6, rtol=0)
    mixed = nn.BatchNorm2d(4)(x).view(2, 6, 4, 3, 3).mean((1, 3, 4))
    assert mixed.abs().min() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_has_fp32_statistics(dtype, route):
    torch.manual_seed(1)
    # |mean| is 64 times std: bf16 statistics would be off by whole units
    x = (torch.randn(32, 8, 6, 6) + 64).to(dtype).contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    plain = plain_norm(8, 4)
    mine = convert(copy.deepcopy(plain))
    got, wanted = run(mine, x, grad, 1), run(plain, x.float(), grad.float(), 2)
    assert got[0].dtype == got[1].dtype == dtype
    assert mine.running_mean.dtype == torch.float32
    step = torch.finfo(dtype).eps
    for a, b in zip(got[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2 * step, atol=2 * step)
    assert_all_close(got[2:], wanted[2:], rtol=1e-3, atol=1e-3)


def test_half_input_without_running_statistics_has_fp32_ones_too():
    torch.manual_seed(1)
    x = (torch.randn(32, 8) + 64).bfloat16()
    bare = ViewBatchNorm(8, track_running_stats=False)
    assert torch.equal(bare(x), ViewBatchNorm(8)(x))


def test_gradients_by_finite_differences(route):
    torch.manual_seed(0)
    norm = ViewBatchNorm(3, dtype=torch.float64)
    for p in norm.parameters():
        nn.init.normal_(p)
    x = torch.randn(6, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def apply(x, weight, bias):
        return norm_ops.normalise(
            x, weight, bias, None, momentum=0.1, eps=1e-5, views=2, group=None
        )

    assert torch.autograd.gradcheck(apply, (x, norm.weight, norm.bias))


def test_strange_strides_and_expanded_gradient():
    torch.manual_seed(0)
    plain = plain_norm(6, 4)
    mine = convert(copy.deepcopy(plain))
    x = torch.randn(6, 5, 7, 8).permute(3, 0, 1, 2)  # neither contiguous nor channels_last
    grad = torch.randn(1, 6, 1, 1).expand(8, 6, 5, 7)
    assert_all_close(run(mine, x, grad, 1), run(plain, x, grad, 2))


@pytest.mark.parametrize("affine", [True, False])
def test_one_view_and_eval_are_plain_batchnorm(affine):
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(4, affine=affine)
    mine = ViewBatchNorm(4, affine=affine, views=1)
    x = images(1, (5, 4, 3, 3))
    torch.testing.assert_close(mine(x), plain(x), rtol=0, atol=0)
    set_views(mine, 2)
    torch.testing.assert_close(mine.eval()(x), plain.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(mine.running_var, plain.running_var)


def test_without_affine_or_running_statistics():
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(4, affine=False, track_running_stats=False)
    mine = convert(copy.deepcopy(plain))
    x = torch.randn(6, 4)
    wanted = torch.cat([plain(chunk) for chunk in x.chunk(2)])
    torch.testing.assert_close(mine(x), wanted)
    torch.testing.assert_close(mine.eval()(x), plain.eval()(x))
    assert not mine.state_dict()


def test_state_dict_moves_to_and_from_batchnorm():
    plain = nn.BatchNorm2d(4)
    plain(torch.randn(3, 4, 2, 2))
    mine = ViewBatchNorm(4)
    mine.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(mine.running_mean, plain.running_mean)
    assert list(mine.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(mine.state_dict(), strict=True)
    bare = plain.state_dict()
    del bare["num_batches_tracked"]
    mine.load_state_dict(bare, strict=True)
    before = mine.num_batches_tracked.clone()
    mine(torch.randn(4, 4, 2, 2))
    assert mine.num_batches_tracked == before


def test_what_cannot_be_split_is_refused():
    norm = ViewBatchNorm(4)
    with pytest.raises(ValueError, match="5 rows cannot be split into 2 views"):
        norm(torch.randn(5, 4))
    with pytest.raises(ValueError, match="more than one value per channel and view"):
        norm(torch.randn(2, 4))
    with pytest.raises(ValueError, match="momentum=None"):
        ViewBatchNorm(4, momentum=None)
    with pytest.raises(ValueError, match="views must be at least 1"):
        set_views(norm, 0)


def test_convert_keeps_parameters_sharing_and_mode():
    shared = nn.BatchNorm2d(3)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.ModuleDict({"again": shared}))
    net.eval()
    weight = shared.weight
    assert convert(net, views=3) is net
    assert isinstance(net[1], ViewBatchNorm) and net[1] is net[2]["again"]
    assert net[1].weight is weight and net[1].views == 3 and not net[1].training
    assert convert(net, views=2)[1].views == 2  # a second time: only the number changes
    one = nn.SyncBatchNorm(3)
    assert isinstance(convert(one), ViewBatchNorm)


class NormAct(nn.BatchNorm2d):
    """As timm has it: the activation is part of the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.PReLU(channels)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_an_activation_inside_the_norm_is_kept():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4))
    x = torch.randn(6, 3, 8, 8)
    wanted = torch.cat([net(view) for view in x.chunk(2)])
    keys = list(net.state_dict())
    net[1].reset_running_stats()
    torch.testing.assert_close(convert(net)(x), wanted)
    assert isinstance(net[1], ViewBatchNorm) and list(net.state_dict()) == keys
    assert (wanted < 0).any()  # by the activation's slope
    with pytest.raises(ValueError, match="Doubled is a BatchNorm with a forward of its own"):
        convert(nn.Sequential(Doubled(3)))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_converted_layers_are_the_same_objects(kind):
    norm, calls = kind(4), []
    norm.register_forward_hook(lambda *_: calls.append(1))
    norm.register_buffer("extra", torch.ones(1))
    norm.note = "mine"
    assert convert(norm) is norm and isinstance(norm, ViewBatchNorm)
    assert isinstance(norm, kind)  # code that freezes BatchNorm asks so
    norm(torch.randn(4, 4, *[2] * {nn.BatchNorm1d: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[kind]))
    assert calls == [1] and norm.extra == 1 and norm.note == "mine"


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (Doubled(3), "forward of its own"),
        (nn.BatchNorm2d(3, momentum=None), "momentum=None"),
        (nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(3), dim=None), "parametrization"),
    ],
)
def test_what_cannot_be_converted_leaves_everything_as_it_was(norm, message):
    net = nn.Sequential(nn.BatchNorm2d(3), norm)
    with pytest.raises(ValueError, match=message):
        convert(net)
    assert type(net[0]) is nn.BatchNorm2d


def test_a_synchronised_layer_stays_synchronised():
    net = nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm2d(3))
    assert [layer.sync for layer in convert(net)] == [True, False]
    assert [layer.sync for layer in convert(net, sync=False)] == [False, False]


def test_compiles_in_one_piece():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), ViewBatchNorm(4), nn.ReLU(inplace=True))
    other = copy.deepcopy(net)
    x = torch.randn(6, 3, 5, 5)
    results = []
    for module, call in (
        (net, net),
        (other, torch.compile(other, backend="aot_eager", fullgraph=True)),
    ):
        out = call(x)
        out.square().sum().backward()
        results.append([out, module[0].weight.grad, module[1].weight.grad, *module[1].buffers()])
    assert_all_close(results[1], results[0], rtol=1e-4, atol=1e-5)


MEANS = (0.0, 100.0)
CASES = [(route, mean) for route in ("kernels", "formulas") for mean in MEANS]


def _rank(rank: int, file: str) -> None:
    world = 2
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    whole, fits, results, sent = dist.all_reduce, norm_ops._fits_kernels, [], []

    def counted(tensor, **kwargs):
        sent.append(tuple(tensor.shape))
        return whole(tensor, **kwargs)

    dist.all_reduce = counted
    try:
        for case, (route, _) in zip(torch.load(f"{file}.in"), CASES, strict=True):
            norm_ops._fits_kernels = fits if route == "kernels" else lambda *_: False
            norm = ViewBatchNorm(6, sync=True)
            norm.load_state_dict(case["norm"])
            x, grad = (
                torch.cat([view.chunk(world)[rank] for view in case[name].chunk(2)])
                for name in ("x", "grad")
            )
            results.append(run(norm, x, grad, 1))
        torch.save((results, sent), f"{file}.out{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_equal_one_process(in_ranks, tmp_path):
    """Two gloo ranks with sync against one process on the whole batch, on both routes.

    Tolerance 1e-5 for centred input. At |mean| = 100 std, 2e-4: fp32 input carries 100·6e-8 of a
    std, and gradients sum over it; fp32 sums of squares would be off by 100²·6e-8 = 6e-4 and more.
    """
    torch.manual_seed(0)
    cases, wanted = [], []
    for _, mean in CASES:
        norm = convert(plain_norm(6, 4))
        x = images(2, (8, 6, 3, 3)).detach() + mean
        case = {"norm": copy.deepcopy(norm.state_dict()), "x": x, "grad": torch.randn_like(x)}
        cases.append(case)
        wanted.append(run(norm, x, case["grad"], 1))
    file = str(tmp_path / "rendezvous")
    torch.save(cases, f"{file}.in")
    in_ranks(_rank, 2, file)
    (first, sent), (second, _) = (torch.load(f"{file}.out{r}") for r in range(2))
    # One message a layer each way, both views in it.
    assert sent == [(2, 2, 6)] * 2 * len(CASES)
    for a, b, want, (_, mean) in zip(first, second, wanted, CASES, strict=True):
        rows = [
            torch.cat([torch.cat(pair) for pair in zip(a[i].chunk(2), b[i].chunk(2), strict=True)])
            for i in range(2)
        ]
        # Weight gradients are each rank's own: DDP would average them.
        got = (*rows, a[2] + b[2], a[3] + b[3], a[4], a[5])
        tolerance = 1e-5 if mean == 0 else 2e-4
        assert_all_close(got, want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(a[4:], b[4:], rtol=0, atol=0)


def test_sync_without_a_group_changes_nothing():
    torch.manual_seed(0)
    norm = ViewBatchNorm(4)
    other = copy.deepcopy(norm)
    set_sync(other, True)
    x = torch.randn(6, 4)
    torch.testing.assert_close(other(x), norm(x), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_gpu_equals_one_call_per_view(dtype, shape, route):
    torch.manual_seed(0)
    plain = plain_norm(shape[1], len(shape)).cuda()
    mine = convert(copy.deepcopy(plain))
    x = images(2, shape, dtype).detach().cuda()
    grad = torch.randn_like(x)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.cuda.synchronize()
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = run(mine, x, grad, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_all_close(got, run(plain, x, grad, 2), rtol=tolerance, atol=tolerance)
