"""Every update gives the same weights, momentum and target, whatever their layout in memory."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import logging
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from byol_fast.optim import LARS, ema_
from byol_fast.updates.layouts import dense, overlapping
from tests.byol_fast import fake_amp_c

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
IMPLS = ["foreach", pytest.param("fused", marks=TRITON), "apex"]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "gaps": lambda t: torch.stack((t, t), dim=-1)[..., 0],
    "offset": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
}
# Of parameter, gradient, momentum and target: each beside the parameter in every pair of layouts,
# and some in four.
MIXES = [
    (p, *(other if place == where else p for where in range(3)))
    for p, other, place in itertools.product(LAYOUTS, LAYOUTS, range(3))
]
MIXES = [*dict.fromkeys(MIXES), *list(itertools.permutations(LAYOUTS, 4))[::7]]


@pytest.fixture(autouse=True)
def apex_without_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "amp_C", fake_amp_c)
    monkeypatch.delitem(sys.modules, "byol_fast.updates.apex_update", raising=False)


def drawn(seed: int, shape: tuple[int, ...] = (3, 4, 2, 5)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Bench:
    """An optimizer over tensors of any layout, and their targets.

    Parameters get their layout after the optimizer was made: "fused" refuses some at once.
    """

    def __init__(self, impl: str, rows: list[tuple[Tensor, Tensor, Tensor | None, Tensor]]) -> None:
        self.params = [
            nn.Parameter(row[0].new_zeros(row[0].shape, dtype=torch.float32)) for row in rows
        ]
        adapted, plain = self.params[::2], self.params[1::2]
        groups = [{"params": adapted}, {"params": plain, "weight_decay": 0.0, "adapt": False}]
        self.optimizer = LARS([g for g in groups if g["params"]], 0.5, weight_decay=0.1, impl=impl)
        for p, (data, _, momentum, _) in zip(self.params, rows, strict=True):
            p.data = data
            if momentum is not None:
                self.optimizer.state[p]["momentum_buffer"] = momentum
        self.grads, self.targets = [row[1] for row in rows], [row[3] for row in rows]

    def run(self, steps: int = 2) -> list[list[Tensor]]:
        """Parameters, momentum and targets after some steps."""
        for _ in range(steps):
            for p, grad in zip(self.params, self.grads, strict=True):
                p.grad = grad.detach()
            self.optimizer.step_and_average(self.targets, self.params, 0.75)
        momentum = [self.optimizer.state[p]["momentum_buffer"] for p in self.params]
        return [[p.detach() for p in self.params], momentum, self.targets]


def assert_equal(found: list[list[Tensor]], wanted: list[list[Tensor]], names: list[str]) -> None:
    for what, mine, other in zip(("parameter", "momentum", "target"), found, wanted, strict=True):
        for name, a, b in zip(names, mine, other, strict=True):
            apart = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
            assert apart < 1e-6, f"{what} of {name} is {apart:.1g} off"


@pytest.mark.parametrize("impl", IMPLS)
def test_any_mix_of_layouts(impl: str) -> None:
    """The update of a tensor depends on its elements alone, not on where they lie."""
    plain = [tuple(drawn(4 * n + k) for k in range(4)) for n in range(len(MIXES))]
    mixed = [
        tuple(LAYOUTS[name](t) for name, t in zip(mix, row, strict=True))
        for mix, row in zip(MIXES, plain, strict=True)
    ]
    wanted = Bench("reference", copy.deepcopy(plain)).run()
    names = [", ".join(mix) for mix in MIXES]
    assert_equal(Bench(impl, mixed).run(), wanted, names)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_momentum_of_a_contiguous_checkpoint_in_a_channels_last_model(impl: str) -> None:
    """Loaded momentum takes the parameter's memory order, and nobody else's memory."""
    row = [drawn(seed, (8, 4, 3, 3)) for seed in range(4)]
    first = Bench("reference", [tuple(t.clone() for t in row)])
    first.run()
    saved = first.optimizer.state_dict()
    last = LAYOUTS["channels_last"]
    then = Bench(impl, [tuple(last(t) for t in row)])
    then.run(1)  # a state to be replaced
    then.params[0].data, then.targets = last(first.params[0].detach()), [last(first.targets[0])]
    then.optimizer.load_state_dict(saved)
    momentum = then.optimizer.state[then.params[0]]["momentum_buffer"]
    assert momentum.is_contiguous(memory_format=torch.channels_last)
    own = momentum.data_ptr()
    assert_equal(then.run(), first.run(), ["the only one"])
    assert then.optimizer.state[then.params[0]]["momentum_buffer"].data_ptr() == own
    then.run(1)
    assert saved["state"][0]["momentum_buffer"].data_ptr() != own  # two optimizers, two momenta


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_momentum_of_another_shape_is_refused_and_nothing_is_loaded(impl: str) -> None:
    bench = Bench(impl, [tuple(drawn(seed, (4, 3)) for seed in range(4))])
    bench.run()
    saved = copy.deepcopy(bench.optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 7.0
    saved["state"][0]["momentum_buffer"] = torch.zeros(3, 4)
    before = bench.optimizer.state[bench.params[0]]["momentum_buffer"].clone()
    with pytest.raises(ValueError, match=r"parameter 0 has shape \[3, 4\], the parameter \[4, 3\]"):
        bench.optimizer.load_state_dict(saved)
    assert torch.equal(bench.optimizer.state[bench.params[0]]["momentum_buffer"], before)
    assert bench.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_sizes_of_nothing_and_of_one(impl: str) -> None:
    shapes = [(0,), (), (3, 0, 2), (1,), (2, 1, 1), (0, 4)]
    rows = [tuple(drawn(4 * n + k, s) for k in range(4)) for n, s in enumerate(shapes)]
    wanted = Bench("reference", copy.deepcopy(rows)).run()
    assert_equal(Bench(impl, rows).run(), wanted, [str(s) for s in shapes])
    empty = [tuple(drawn(k, (0, 2)) for k in range(4))]  # a group without a single element
    assert_equal(
        Bench(impl, copy.deepcopy(empty)).run(), Bench("reference", empty).run(), ["(0, 2)"]
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_one_by_one_filters_whose_strides_differ_by_name_alone(impl: str) -> None:
    """A dimension of one element has a stride that is never taken."""
    rows = []
    for number, layout in enumerate(("contiguous", "channels_last")):
        odd = "channels_last" if layout == "contiguous" else "contiguous"
        tensors = [drawn(4 * number + k, (6, 4, 1, 1)) for k in range(4)]
        rows.append((LAYOUTS[layout](tensors[0]), *(LAYOUTS[odd](t) for t in tensors[1:])))
    wanted = Bench("reference", copy.deepcopy(rows)).run()
    assert_equal(Bench(impl, rows).run(), wanted, ["contiguous", "channels_last"])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_that_are_expanded_or_shared(impl: str) -> None:
    grad = drawn(1, (4, 1, 1, 1)).expand(4, 3, 2, 2)
    rows = [
        (drawn(n, (4, 3, 2, 2)), grad, drawn(n + 5, (4, 3, 2, 2)), drawn(n + 9, (4, 3, 2, 2)))
        for n in (2, 3)
    ]
    wanted = Bench("reference", copy.deepcopy(rows)).run()
    assert_equal(Bench(impl, rows).run(), wanted, ["first", "second"])
    assert torch.equal(grad, drawn(1, (4, 1, 1, 1)).expand(4, 3, 2, 2))


KINDS = [torch.float64, torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("impl", IMPLS)
def test_parameters_of_several_dtypes(impl: str) -> None:
    """Equal within roundings of the coarsest dtype of a row; momentum has the parameter's dtype."""
    rows = []
    for n, (dtype, other) in enumerate(itertools.product(KINDS, KINDS)):
        p, g, m, t = (drawn(4 * n + k, (4, 3, 2, 2)) for k in range(4))
        rows.append((p.to(dtype), g.to(dtype), m.to(other), t.to(other)))
    wanted = Bench("reference", copy.deepcopy(rows)).run()
    found = Bench(impl, rows).run()
    for mine, others in zip(found, wanted, strict=True):
        for row, a, b in zip(rows, mine, others, strict=True):
            assert a.dtype == b.dtype
            rounding = max(1e-6, *(4 * torch.finfo(t.dtype).eps for t in row))
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)
    assert all(m.dtype == p.dtype for p, m in zip(found[0], found[1], strict=True))


def shared_rows() -> list[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Parameters that are one storage, overlap in part, or only lie beside each other."""
    base, flat = drawn(1, (40,)), drawn(2, (24,))
    params = [base[:24], base[:24].view(24), base[12:36], flat[:12], flat[12:]]
    return [(p, drawn(3 + n, p.shape), None, drawn(20 + n, p.shape)) for n, p in enumerate(params)]


@pytest.mark.parametrize("impl", IMPLS)
def test_parameters_that_share_storage_are_updated_one_after_the_other(impl: str) -> None:
    results = []
    for way in ("reference", impl):
        rows = shared_rows()
        params = [nn.Parameter(row[0]) for row in rows]
        optimizer = LARS([{"params": params[::2]}, {"params": params[1::2]}], 0.5, impl=way)
        for p, row in zip(params, rows, strict=True):
            p.grad = row[1]
        targets = [row[3] for row in rows]
        for _ in range(2):
            optimizer.step_and_average(targets, params, 0.75)
        results.append([[p.detach() for p in params], targets, targets])
    assert_equal(results[1], results[0], ["all", "all again", "a part", "beside", "beside"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_targets_that_share_storage_average_one_after_the_other(impl: str, as_tensor: bool) -> None:
    a, b, t, u = (drawn(n, (4, 3)) for n in range(4))
    params = [nn.Parameter(a.clone()), nn.Parameter(b.clone())]
    optimizer = LARS(params, 0.0, impl=impl)
    for p in params:
        p.grad = torch.zeros_like(p)
    decay = torch.tensor(0.75, dtype=torch.float64, device=DEVICE) if as_tensor else 0.75
    both, twice = t.clone(), [u.clone(), u.clone()]
    # One target of two parameters, and two targets of one parameter.
    optimizer.step_and_average([both, both, *twice], [*params, params[0], params[0]], decay)
    torch.testing.assert_close(both, (t * 0.75 + a * 0.25) * 0.75 + b * 0.25)
    for one in twice:
        torch.testing.assert_close(one, u * 0.75 + a * 0.25)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_an_average_over_mixed_layouts_and_dtypes(as_tensor: bool) -> None:
    online = [
        LAYOUTS[name](drawn(n)).to(kind)
        for n, (name, kind) in enumerate(zip(LAYOUTS, [*KINDS, *KINDS], strict=False))
    ]
    target = [LAYOUTS[name](drawn(10 + n)) for n, name in enumerate(reversed(LAYOUTS))]
    wanted = [0.75 * t + 0.25 * o.float() for t, o in zip(target, online, strict=True)]
    ema_(
        target,
        online,
        torch.tensor(0.75, dtype=torch.float64, device=DEVICE) if as_tensor else 0.75,
    )
    for mine, other in zip(target, wanted, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("impl", ["fused", "apex"])
def test_what_the_kernels_cannot_take_is_logged_once(
    impl: str, caplog: pytest.LogCaptureFixture
) -> None:
    if impl == "fused":
        pytest.importorskip("triton", reason="no Triton")
    rows = [
        (drawn(0).double(), drawn(1).double(), None, drawn(2)),
        tuple(drawn(n) for n in range(4)),
    ]
    bench = Bench(impl, rows)
    with caplog.at_level(logging.WARNING):
        bench.run(3)
    assert len(caplog.messages) == 1
    assert f"by foreach, not by {impl}" in caplog.text and "float64, not float32" in caplog.text
    calls = fake_amp_c.CALLS
    assert impl != "apex" or calls  # the other one was updated by the kernels


def test_dense_and_overlapping() -> None:
    base = torch.zeros(4, 6)
    for whole in (
        base,
        base.t(),
        base[1:3],
        base[:, :1].squeeze(1)[:1],
        torch.zeros(0, 3),
        torch.zeros(()),
    ):
        assert dense(whole)
    for not_whole in (
        base[:, ::2],
        base[:1].expand(3, 6),
        base.as_strided((3, 3), (1, 1)),
        base[:, 1:],
    ):
        assert not dense(not_whole)
    assert not dense(torch.zeros(2, 2).to_sparse())
    assert overlapping([base[:2], base[2:], base[1:3], torch.zeros(3), base[:0]]) == {0, 1, 2}
    assert overlapping([base, torch.zeros(4)]) == set()
    assert overlapping([base, base[:1], base[3:]]) == {0, 1, 2}
    with torch.device("meta"):
        assert overlapping([torch.zeros(3), torch.zeros(3)]) == set()
