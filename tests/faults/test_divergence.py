"""Steps that are not finite (F15) and embeddings that collapse (F16)."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from faults.harness import SMALL
from PIL import Image
from support import final

from byol_fast import config as configuration
from byol_fast import recipes
from byol_fast.watching import metrics
from pipelines.plan import RowStream
from pipelines.stores import open_store

# KINDS is {number of the update, from 0: what is wrong with it}, on the ranks RANKS alone. Every
# rank prints a digest of all that lasts before and after each update.
NOT_FINITE = """
import dataclasses, hashlib, os
import torch
from byol_fast import trainer
KINDS, RANKS, RANK = {kinds!r}, {ranks!r}, os.environ.get("RANK", "0")

def digest(trainer):
    whole = hashlib.sha256()
    for tensor in trainer.model.state_dict().values():
        whole.update(tensor.numpy().tobytes())
    for state in trainer.optimizer.state.values():
        whole.update(state["momentum_buffer"].numpy().tobytes())
    return whole.hexdigest()[:16]

now = -1
real_one = trainer.Trainer._one_step
def one_step(self, views):
    global now
    now, before = self.step, digest(self)
    output = real_one(self, views)
    print(f"digest {{RANK}} {{now}} {{before}} {{digest(self)}}\\n", end="", flush=True)
    return output
trainer.Trainer._one_step = one_step

BAD = {{"nan": float("nan"), "inf": float("inf")}}
real_step = trainer.train_step
def train_step(model, networks, optimizer, batches, **options):
    what, _, value = KINDS.get(now, "").partition(" ")
    if not what or RANK not in RANKS:
        return real_step(model, networks, optimizer, batches, **options)
    bad, real_loss, hook = BAD[value], networks.loss, None
    if what == "loss":
        networks = dataclasses.replace(networks, loss=lambda p, t: real_loss(p, t) * bad)
    elif what == "gradient":
        weight = next(model.online.parameters())
        def spoil(gradient):
            gradient = gradient.clone()
            gradient[0, 0, 0, 0] = bad
            return gradient
        hook = weight.register_hook(spoil)
    elif what == "image":
        def spoiled(batches):
            for x in batches:
                x = x.clone()
                x[1, 0, 0, 0, 0] = bad
                yield x
        batches = spoiled(batches)
    output = real_step(model, networks, optimizer, batches, **options)
    if hook is not None:
        hook.remove()
    return output
trainer.train_step = train_step
"""
KINDS = {2: "loss nan", 4: "loss inf", 6: "gradient nan", 8: "gradient inf", 10: "image nan"}


def digests(said: str) -> dict[int, dict[int, tuple[str, str]]]:
    """{update: {rank: (before, after)}}"""
    found: dict[int, dict[int, tuple[str, str]]] = {}
    for rank, step, before, after in re.findall(r"digest (\d) (\d+) (\w{16}) (\w{16})", said):
        found.setdefault(int(step), {})[int(rank)] = before, after
    return found


def assert_all_finite(out: Path) -> None:
    state = final(out)
    momentum = [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
    for tensor in [*state["model"].values(), *momentum, *state["probe"]["linear"].values()]:
        assert tensor.isfinite().all()


@pytest.mark.dist
@pytest.mark.parametrize("sync", ["true", "false"])
def test_f15_one_rank_of_two_is_not_finite(runs, images: Path, tmp_path: Path, sync: str):
    out = tmp_path / "run"
    fault = NOT_FINITE.format(kinds=KINDS, ranks="1")
    run = runs(out, *SMALL, "--bn-sync", sync, ranks=2, fault=fault)
    run.wait()
    assert run.codes == {0: 0, 1: 0}, run.said
    seen = digests(run.said)
    assert sorted(seen) == list(range(24)), run.said
    for step, by_rank in seen.items():
        for before, after in by_rank.values():
            assert (before == after) == (step in KINDS), f"update {step}"
        if sync == "true":  # else each rank has BatchNorm statistics of its own
            assert by_rank[0] == by_rank[1]
    assert_all_finite(out)
    told = json.loads((out / "diverged-step.json").read_text())
    assert told["skipped_steps"] == 5 and [s["step"] for s in told["steps"]] == [3, 5, 7, 9, 11]
    assert [1 in s["ranks_with_a_loss_not_finite"] for s in told["steps"]] == [
        *(True, True, False, False, True)
    ]
    assert_rows(told["steps"][0], images, out, step=2)
    log = metrics.read(out / "metrics.jsonl")
    assert sum(event.kind == "skipped" for event in log.events) == 5
    assert json.loads((out / "summary.json").read_text())["skipped_steps"] == 5


def assert_rows(told: dict, images: Path, out: Path, *, step: int) -> None:
    """The rows are those of the plan, rank by rank."""
    store = open_store(str(images))
    config = configuration.parse(["--config", str(out / "config.yaml")])
    wanted = []
    for rank in range(2):
        stream = RowStream(
            configuration.spec(recipes.fill(config)),
            seed=0,
            sizes=store.sizes,
            batch_size=8,
            rank=rank,
            world_size=2,
        )
        wanted += [(rank, int(index)) for index in stream.rows(step).ids]
    assert [(row["rank"], row["index"]) for row in told["rows"]] == wanted
    assert {row["epoch"] for row in told["rows"]} == {0}
    assert all(row["name"].endswith(f"[{row['index']}]") for row in told["rows"])


@pytest.mark.parametrize("policy", ["stop", "stop-nonfinite"])
def test_f15_stop_by_policy(runs, tmp_path: Path, policy: str):
    out = tmp_path / "run"
    fault = NOT_FINITE.format(kinds={5: "loss nan"}, ranks="0")
    run = runs(out, *SMALL, "--checkpoint.every", 2, "--on-trouble", policy, fault=fault)
    assert run.wait() == 5, run.said
    assert "not finite at step 6" in run.said and "Traceback" not in run.said
    assert run.status["state"] == "failed" and "not finite" in run.status["reason"]
    # Of step 2 or 4, or a step later where the one before was still being written.
    assert 2 <= final(out)["step"] <= 5
    assert_all_finite(out)
    assert (out / "diverged-step.json").exists()


def test_f15_twenty_in_succession_end_the_run_whatever_the_policy(runs, tmp_path: Path):
    out = tmp_path / "run"
    fault = NOT_FINITE.format(kinds={step: "gradient nan" for step in range(2, 24)}, ranks="0")
    run = runs(out, *SMALL, "--log-every", 4, "--on-trouble", "stop-collapsed", fault=fault)
    assert run.wait() == 5, run.said
    assert run.status["step"] == 24 and "22 so far" in run.said  # looked at after 4, 8, …, 24
    assert not list((out / "checkpoints").glob("*.pt"))


def test_f15_accumulated_and_fp16_steps_are_guarded_too(runs, tmp_path: Path):
    for name, options in {
        "accumulate": ("--accumulate", 2),
        "bf16": ("--precision", "bf16"),
        "fp16": ("--precision", "fp16"),
    }.items():
        fault = NOT_FINITE.format(kinds={3: "loss inf", 5: "image nan"}, ranks="0")
        run = runs(tmp_path / name, *SMALL, *options, "--max-steps", 8, fault=fault)
        assert run.wait() == 0, run.said
        for step, by_rank in digests(run.said).items():
            before, after = by_rank[0]
            assert before == after if step in (3, 5) else before != after or name == "fp16"
        assert_all_finite(tmp_path / name)
        told = json.loads((tmp_path / name / "diverged-step.json").read_text())
        assert [s["step"] for s in told["steps"]] == [4, 6]


def test_a_row_is_replayed_as_it_was_shown(runs, images: Path, tmp_path: Path):
    """The picture holds the very pixels that the network got."""
    out = tmp_path / "run"
    assert runs(out, *SMALL, "--max-steps", 1).wait() == 0
    store = open_store(str(images))
    config = configuration.parse(["--config", str(out / "config.yaml")])
    stream = RowStream(configuration.spec(config), seed=0, sizes=store.sizes, batch_size=8)
    index = int(stream.rows(0).ids[3])
    run = runs(out, "--config", out / "config.yaml", "--replay", f"epoch=0,index={index}")
    assert run.wait() == 0, run.said
    assert f"images.npz[{index}], epoch 0, index {index}" in run.said
    picture = np.asarray(Image.open(out / f"replay-epoch0-index{index}.png"))
    shown = np.load(out / "views.npz")["views"][:, 3]  # of the run's first batch
    assert np.array_equal(picture[:, :8], shown[0]) and np.array_equal(picture[:, -8:], shown[1])
    assert final(out)["step"] == 1  # nothing was trained
    for words, problem in (("epoch=0,index=64", "64 images"), ("epoch=zero", "epoch=3,index=1234")):
        wrong = runs(out, "--config", out / "config.yaml", "--replay", words)
        assert wrong.wait() == 2 and problem in wrong.said


NO_PREDICTOR = """
import torch
from byol_fast import assemble
real = assemble.build_model
def build(config, world):
    model = real(config, world)
    if {collapse}:
        model.online.predictor = torch.nn.Identity()
    return model
assemble.build_model = build
"""
# Long enough, and fast enough, to collapse by the thresholds of byol_fast/watching/alarms.py.
COLLAPSING = (*SMALL, "--epochs", "15", "--base-lr", "1.0", "--target-decay", "0.9")
ALARM_WITHIN = 80  # steps, with a line of the log each step


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param("warn", marks=pytest.mark.slow),
        pytest.param("stop", marks=pytest.mark.slow),
        "stop-collapsed",
    ],
)
def test_f16_a_forced_collapse_raises_the_alarm(runs, tmp_path: Path, policy: str):
    out = tmp_path / "run"
    fault = NO_PREDICTOR.format(collapse=True)
    run = runs(out, *COLLAPSING, "--on-collapse", policy, fault=fault)  # the setting's old name
    assert run.wait() == (0 if policy == "warn" else 5), run.said
    alarms = [e for e in metrics.read(out / "metrics.jsonl").events if e.kind == "alarm"]
    assert alarms and alarms[0].step <= ALARM_WITHIN
    assert "almost the same point" in alarms[0].text
    if policy != "warn":
        assert run.step == alarms[0].step and "almost the same point" in run.status["reason"]


def test_f16_a_healthy_run_raises_none(runs, tmp_path: Path):
    out = tmp_path / "run"
    run = runs(out, *COLLAPSING, "--on-trouble", "stop", fault=NO_PREDICTOR.format(collapse=False))
    assert run.wait() == 0, run.said
    rows = [r for r in metrics.read(out / "metrics.jsonl").rows if "loss" in r]
    assert len(rows) == 120 and all(math.isfinite(r["loss"]) for r in rows)
