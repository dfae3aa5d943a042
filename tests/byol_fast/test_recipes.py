"""Recipes: the authors' table, the rule between its rows, the run's arithmetic."""

import contextlib
from typing import get_args, get_type_hints

import pytest

from byol_fast import config, recipes
from byol_fast.config import Config, get, parse
from byol_fast.recipes import COMMON, RECIPE_NAMES, RECIPES, fill, nearest_row, resolve
from pipelines.errors import DataError
from pipelines.plan import total_steps

IMAGENET = 1_281_167


def resolved(argv: str = "", *, samples: int = IMAGENET, ranks: int = 8) -> recipes.Resolved:
    return resolve(parse(argv.split()), samples=samples, world_size=ranks)


@pytest.mark.parametrize(
    ("epochs", "peak_lr", "weight_decay", "decay"),
    [
        (40, 7.2, 1e-6, 0.97),
        (100, 7.2, 1e-6, 0.99),
        (200, 4.8, 1e-6, 0.99),
        (300, 4.8, 1e-6, 0.99),
        (1000, 3.2, 1.5e-6, 0.996),
    ],
)
def test_the_authors_table(epochs: int, peak_lr: float, weight_decay: float, decay: float) -> None:
    run = resolved(f"--epochs {epochs}")
    assert run.peak_lr == pytest.approx(peak_lr)
    assert (run.weight_decay, run.target_decay) == (weight_decay, decay)
    assert (run.global_batch, run.split.micro_batch, run.warmup_steps) == (4096, 512, 3127)


@pytest.mark.parametrize(("epochs", "steps"), [(100, 31278), (1000, 312784)])
def test_steps_of_the_paper(epochs: int, steps: int) -> None:
    run = resolved(f"--epochs {epochs}")
    assert run.total_steps == run.stop_after == steps == total_steps(epochs, IMAGENET, 4096)


@pytest.mark.parametrize(
    ("epochs", "row"),
    [
        *[(1, 40), (63, 40), (64, 100), (150, 200), (400, 300), (547, 300), (548, 1000)],
        pytest.param(10**400, 1000, id="huge"),
    ],
)
def test_other_epochs_use_the_row_nearest_in_ratio(epochs: int, row: int) -> None:
    assert nearest_row(RECIPES["imagenet"].rows, epochs) == row


def test_of_two_equally_near_rows_the_longer_is_used() -> None:
    row = RECIPES["imagenet"].rows[40]
    assert nearest_row({100: row, 400: row}, 200) == 400


@pytest.mark.parametrize("batch", [256, 512, 8192])
def test_the_rate_is_linear_in_the_batch(batch: int) -> None:
    assert resolved(f"--epochs 1000 --batch-size {batch}").peak_lr == pytest.approx(
        0.2 * batch / 256
    )


def test_a_value_set_by_hand_wins_and_is_said() -> None:
    run = resolved("--epochs 100 --base-lr 0.5 --target-decay 0.9 --weight-decay 0 --views byol")
    assert (run.peak_lr, run.target_decay, run.weight_decay) == (8.0, 0.9, 0.0)
    assert run.arithmetic()[-3:] == [
        "set by hand: optim.base_lr 0.5 (recipe: 0.45)",
        "set by hand: optim.weight_decay 0.0 (recipe: 1e-06)",
        "set by hand: model.target_decay 0.9 (recipe: 0.99)",
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fills_every_gap_and_stays_filled(name: str) -> None:
    filled = fill(Config(recipe=name))  # type: ignore[arg-type]
    assert all(get(filled, setting) is not None for setting in RECIPE_NAMES)
    assert fill(filled) == filled
    assert set(COMMON) | set(RECIPES[name].values) <= {*RECIPE_NAMES, "input.accumulate"}
    assert config.spec(filled).image_size == filled.image_size


def test_the_flag_offers_the_recipes_there_are() -> None:
    assert get_args(get_type_hints(Config)["recipe"]) == tuple(RECIPES)


def test_cifar_takes_the_steps_of_its_source() -> None:
    """Four times the gradient: a quarter of SGD's lr .12 × batch/256, four times its decay 5e-4."""
    run = resolved("--recipe cifar10", samples=50_000, ranks=1)
    c = run.config
    assert (c.backbone, c.image_size, c.model.stem, c.epochs) == ("resnet18", 32, "cifar", 200)
    assert run.peak_lr * 4 == pytest.approx(0.06 * run.global_batch / 128)
    assert run.weight_decay / 4 == pytest.approx(5e-4)
    assert not c.optim.adapt and not c.input.blur and c.input.semantics == "torchvision"


def test_mirror_images_can_be_turned_off() -> None:
    spec = config.spec(fill(config.parse(["--recipe", "quickstart", "--views", "no-flip"])))
    assert [view.flip for view in spec.views] == [0.0, 0.0]


def test_arithmetic_of_the_paper() -> None:
    lines = resolved("--epochs 1000").arithmetic()
    assert lines == [
        "recipe imagenet (the BYOL authors; 200 epochs: mmpretrain), 1000-epoch row",
        "lr 3.2 = 0.2 × 4096/256; 4096 = 8 ranks × 512 × 1",
        "312784 steps = 1000 epochs × 1281167 images // 4096",
        "3127 warm-up steps = 10 epochs × 1281167 images // 4096",
        "weight decay 1.5e-06, EMA decay 0.996 → 1",
        "BatchNorm's statistics are over all 4096 images of a step",
    ]


def test_accumulation_is_part_of_the_arithmetic() -> None:
    run = resolved("--accumulate 4 --batch-size 4096", ranks=2)
    assert run.split.micro_batch == 512
    assert "4096 = 2 ranks × 512 × 4" in run.arithmetic()[1]


def test_the_recipes_warm_up_never_fills_the_run() -> None:
    run = resolved("--epochs 10 --batch-size 100", samples=1000, ranks=1)
    assert (run.total_steps, run.warmup_steps) == (100, 10)
    assert run.config.optim.warmup_epochs == 1.0, "printed and saved as it is used"
    assert "10 warm-up steps = 1 epochs × 1000 images // 100" in run.arithmetic()
    assert resolved("--epochs 7 --batch-size 100", samples=1000, ranks=1).warmup_steps == 7
    assert resolved("--epochs 3 --batch-size 100", samples=1000, ranks=1).warmup_steps == 3
    assert resolved("--epochs 11 --batch-size 100", samples=1000, ranks=1).warmup_steps == 100


@pytest.mark.parametrize(
    ("epochs", "warmup", "steps"), [(10, "10", 100), (10, "9", 90), (10, "0.5", 5), (3, "0.3", 3)]
)
def test_a_warm_up_set_by_hand_is_honoured(epochs: int, warmup: str, steps: int) -> None:
    """10 of 10 epochs became a tenth of the run."""
    argv = f"--epochs {epochs} --warmup-epochs {warmup} --batch-size 100"
    run = resolved(argv, samples=1000, ranks=1)
    assert run.warmup_steps == steps
    again = resolve(run.config, samples=1000, world_size=1)  # as from the run's config.yaml
    assert (again.warmup_steps, again.config) == (steps, run.config)
    rises = "the learning rate rises until the run ends" in "\n".join(run.arithmetic())
    assert rises is (steps == run.total_steps)


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup-epochs 11 \(110 steps\) is longer.*use 10 at"):
        resolved("--epochs 10 --warmup-epochs 11 --batch-size 100", samples=1000, ranks=1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("epochs", [1, 2, 9, 10, 11, 1000])
def test_a_saved_configuration_is_the_same_run(recipe: str, epochs: int) -> None:
    run = resolved(f"--recipe {recipe} --epochs {epochs}", samples=100_000, ranks=1)
    again = resolve(run.config, samples=100_000, world_size=1)
    assert again == run
    assert run.warmup_steps < run.total_steps


@pytest.mark.parametrize(
    ("argv", "ranks", "words"),
    [
        ("", 8, "over all 4096 images of a step"),
        ("--accumulate 8", 1, "over 512 of the 4096 images of a step, not over all as in the"),
        ("--accumulate 8", 1, "8 micro-batches (--input.accumulate)"),
        ("--accumulate 2", 4, "over 2048 of the 4096"),
        ("--bn-sync none", 8, "over 512 of the 4096"),
        ("--bn-sync none", 8, "1 of 8 ranks together (--model.bn-sync)"),
        ("--bn-sync none --accumulate 2", 8, "over 256 of the 4096"),
    ],
)
def test_how_many_images_batchnorm_sees_is_logged(argv: str, ranks: int, words: str) -> None:
    (line,) = [t for t in resolved(argv, ranks=ranks).arithmetic() if "BatchNorm" in t]
    assert words in line


def test_without_batchnorm_nothing_is_said_of_its_statistics() -> None:
    lines = resolved("--method group-ws --accumulate 8", ranks=1).arithmetic()
    assert not any("BatchNorm" in line for line in lines)


def test_max_steps_ends_early_without_touching_the_schedule() -> None:
    run = resolved("--epochs 100 --max-steps 20")
    assert (run.total_steps, run.stop_after) == (31278, 20)
    assert "stops after step 20 of 31278" in run.arithmetic()
    assert resolved("--epochs 100 --max-steps 99999").stop_after == 31278


@pytest.mark.parametrize(
    ("batch", "ranks", "near"),
    [(100, 8, "96 or 104"), (4096, 3, "4095 or 4098"), (3, 8, "--batch-size 8")],
)
def test_a_batch_that_cannot_be_shared_out(batch: int, ranks: int, near: str) -> None:
    with pytest.raises(ValueError, match=near):
        resolved(f"--batch-size {batch}", ranks=ranks)


def test_a_batch_larger_than_the_data() -> None:
    with pytest.raises(DataError, match=r"4096 is larger .*\(1000 images\).*--batch-size 496"):
        resolved(samples=1000)


@pytest.mark.parametrize(
    ("samples", "ranks", "mend"),
    [
        (3, 4, "add images: 4 is the smallest batch here, or start fewer processes"),
        (1, 1, "add images: 2 is the smallest batch here"),
        (4, 4, "use --batch-size 4 or less"),
        (3, 1, "use --batch-size 2 or less"),
    ],
)
def test_what_is_advised_can_be_done(samples: int, ranks: int, mend: str) -> None:
    with pytest.raises(DataError, match=rf"\({samples} images?\): {mend}"):
        resolved(samples=samples, ranks=ranks)


def test_batchnorm_needs_two_images() -> None:
    with pytest.raises(ValueError, match="one image"):
        resolved("--batch-size 8 --no-bn-sync", samples=100)
    assert (
        resolved("--batch-size 8", samples=100).split.micro_batch == 1
    )  # over 8 ranks there are 8


@pytest.mark.parametrize(("of_a_node", "enough"), [("1", False), ("2", True)])
def test_batchnorm_over_a_node_needs_two_images_there(
    of_a_node: str, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", of_a_node)
    with contextlib.nullcontext() if enough else pytest.raises(ValueError, match="one image"):
        assert resolved("--batch-size 8 --bn-sync group", samples=100).split.micro_batch == 1
