"""What `--print-config` shows for each recipe, beside what its source publishes.

Read from the authors' `byol/configs/byol.py` (google-deepmind/deepmind-research), mmpretrain's
`configs/byol/byol_resnet50_16xb256-coslr-200e_in1k.py` with its `_base_` files, and OpenMixup's
`configs/selfsup/byol/{imagenet,imagenet100,stl10}/` with theirs. lr is that of the whole batch.
"""

from __future__ import annotations

import pytest
import yaml

from byol_fast import config
from byol_fast.cli import pretrain_arguments
from byol_fast.recipes import RECIPES, fill, resolve
from pipelines.spec import VIEW1, VIEW2

IMAGENET = 1_281_167
# (recipe, epochs): batch, lr, weight decay, tau, warm-up epochs, backbone, size, semantics
PUBLISHED = {
    ("imagenet", 40): (4096, 7.2, 1e-6, 0.97, 10, "resnet50", 224, "deepmind"),
    ("imagenet", 100): (4096, 7.2, 1e-6, 0.99, 10, "resnet50", 224, "deepmind"),
    ("imagenet", 300): (4096, 4.8, 1e-6, 0.99, 10, "resnet50", 224, "deepmind"),
    ("imagenet", 1000): (4096, 3.2, 1.5e-6, 0.996, 10, "resnet50", 224, "deepmind"),
    ("mmpretrain", 200): (16 * 256, 4.8, 1e-6, 0.99, 10, "resnet50", 224, "torchvision"),
    ("openmixup", 100): (8 * 64 * 8, 7.2, 1e-6, 0.99, 10, "resnet50", 224, "torchvision"),
    ("openmixup", 200): (8 * 64 * 8, 4.8, 1e-6, 0.99, 10, "resnet50", 224, "torchvision"),
    ("openmixup", 300): (8 * 64 * 8, 4.8, 1e-6, 0.99, 10, "resnet50", 224, "torchvision"),
    ("imagenet100", 400): (8 * 64 * 8, 4.8, 1e-6, 0.99, 10, "resnet18", 224, "torchvision"),
    ("stl10", 1000): (8 * 256 * 2, 4.8, 1e-6, 0.99, 10, "resnet50", 96, "torchvision"),
}
# Of a view, in all of these sources: crop 0.08 to 1, flip .5, jitter .4/.4/.2/.1 with p = .8,
# grey .2, blur with sigma .1 to 2, solarize at half; blur and solarize differ between the views.
VIEWS = {"byol": ((1.0, 0.0), (0.1, 0.2)), "no-blur": ((0.0, 0.0), (0.0, 0.2))}


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert pretrain_arguments([*argv, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(("recipe", "epochs"), PUBLISHED)
def test_a_recipe_is_its_source(
    recipe: str, epochs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = printed(capsys, "--recipe", recipe, "--epochs", str(epochs))
    optim, model, given = shown["optim"], shown["model"], shown["input"]
    assert (
        shown["batch_size"],
        pytest.approx(optim["base_lr"] * shown["batch_size"] / 256),
        optim["weight_decay"],
        model["target_decay"],
        optim["warmup_epochs"],
        shown["backbone"],
        shown["image_size"],
        given["semantics"],
    ) == PUBLISHED[recipe, epochs]
    assert (model["hidden_size"], model["stem"], model["method"]) == (4096, "imagenet", "byol")
    assert (given["crop_area_min"], given["views"]) == (0.08, "byol")


@pytest.mark.parametrize(
    ("recipe", "epochs", "variant", "precision", "accumulate"),
    [
        ("imagenet", 300, "paper", "auto", None),
        ("mmpretrain", 200, "mmpretrain", "auto", None),
        ("openmixup", 200, "mmpretrain", "fp16", 8),
    ],
)
def test_what_a_recipe_runs_with(
    recipe: str,
    epochs: int,
    variant: str,
    precision: str,
    accumulate: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = printed(capsys, "--recipe", recipe)
    assert shown["epochs"] == epochs
    assert shown["optim"]["variant"] == variant
    assert (shown["run"]["precision"], shown["input"]["accumulate"]) == (precision, accumulate)


@pytest.mark.parametrize("recipe", ["cifar10", "cifar100"])
def test_cifar_is_lightlys(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """SGD with lr .06 × batch/128 and decay 5e-4 on a quarter of this loss; views of our own."""
    shown = printed(capsys, "--recipe", recipe)
    rate, decay = shown["optim"]["base_lr"], shown["optim"]["weight_decay"]
    assert rate * 4 == pytest.approx(0.06 * 2) and decay / 4 == pytest.approx(5e-4)
    assert (shown["backbone"], shown["image_size"], shown["epochs"]) == ("resnet18", 32, 200)
    assert (shown["model"]["stem"], shown["model"]["hidden_size"]) == ("cifar", 1024)
    assert (shown["optim"]["variant"], shown["input"]["views"]) == ("sgd", "no-blur")


@pytest.mark.parametrize("recipe", ["imagenet", "mmpretrain", "openmixup", "stl10", "cifar10"])
def test_the_views_are_the_published_ones(recipe: str) -> None:
    filled = fill(config.parse(["--recipe", recipe]))
    for view, (blur, solarize) in zip(
        config.spec(filled).views, VIEWS[filled.input.views], strict=True
    ):
        assert (view.blur, view.solarize, view.flip, view.grey) == (blur, solarize, 0.5, 0.2)
        assert (view.jitter, view.brightness, view.contrast) == (0.8, 0.4, 0.4)
        assert (view.saturation, view.hue) == (0.2, 0.1)
        assert (view.crop_area, view.blur_sigma) == ((0.08, 1.0), (0.1, 2.0))
        assert view.solarize_threshold == 0.5
    assert (VIEW1.blur, VIEW2.blur) == (1.0, 0.1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_papers_recipe_alone_starts_as_the_authors(recipe: str) -> None:
    """mmpretrain, OpenMixup and lightly start from He normal weights, the target as a copy."""
    wanted = "authors" if recipe == "imagenet" else "torch"
    assert fill(config.parse(["--recipe", recipe])).model.init == wanted


def test_the_published_shares_of_a_batch() -> None:
    for recipe, ranks, images in (("mmpretrain", 16, 256), ("openmixup", 8, 64)):
        run = resolve(config.parse(["--recipe", recipe]), samples=IMAGENET, world_size=ranks)
        assert run.split.micro_batch == images and run.peak_lr == pytest.approx(4.8)
