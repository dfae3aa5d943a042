"""Settings: flags, files, types, bounds, suggestions, and the way to and from plain values."""

import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from byol_fast import config
from byol_fast.config import FLAGS, Config
from byol_fast.flags import UsageError
from byol_fast.recipes import fill
from byol_fast.settings import CheckpointConfig, InputConfig, OptimConfig
from pipelines.spec import VIEW1, VIEW2


def refused(*argv: str) -> str:
    with pytest.raises(UsageError) as error:
        config.parse(argv)
    return str(error.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--optim.base-lr", "0.3"],
        ["--optim.base-lr=0.3"],
        ["--optim.base_lr", "0.3"],
        ["--optim.base_lr=.3"],
        ["optim.base_lr=0.3"],
        ["--base-lr", "0.3"],
        ["base_lr=3e-1"],
    ],
)
def test_every_spelling_of_a_flag(argv: list[str]) -> None:
    assert config.parse(argv).optim.base_lr == 0.3


def test_values_have_their_types() -> None:
    parsed = config.parse(
        [
            "--data",
            "/d",
            "--epochs",
            "5",
            "--batch_size=64",
            "--weight-decay",
            "1e-6",
            "--hidden-layer",
            "-2",
            "--seed",
            "7",
        ]
    )
    assert (parsed.data, parsed.epochs, parsed.batch_size, parsed.seed) == ("/d", 5, 64, 7)
    assert parsed.optim.weight_decay == 1e-6 and parsed.model.hidden_layer == -2
    assert config.parse(["--hidden-layer", "avgpool"]).model.hidden_layer == "avgpool"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--input.verify"], True),
        (["--input.verify", "false"], False),
        (["--input.verify=no"], False),
        (["--no-input.verify"], False),
        (["--no-verify"], False),
        (["--no_verify", "--verify"], True),
        (["--no-verify", "--input.verify", "on"], True),
    ],
)
def test_switches(argv: list[str], expected: bool) -> None:
    assert config.parse([*argv, "--data", "x"]).input.verify is expected
    assert config.parse([*argv, "--data", "x"]).data == "x"  # no word was swallowed


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "world"),
        (["--model.bn-sync", "group"], "group"),
        (["--bn-sync=none"], "none"),
        (["--no-bn-sync"], "none"),
        (["--no-bn-sync", "--bn-sync"], "world"),
        (["--bn-sync", "false"], "none"),
        (["model.bn_sync=True"], "world"),
    ],
)
def test_a_choice_that_was_a_switch_still_is_one(argv: list[str], expected: str) -> None:
    parsed = config.parse([*argv, "--data", "x"])
    assert (parsed.model.bn_sync, parsed.data) == (expected, "x")


@pytest.mark.parametrize(("saved", "expected"), [(True, "world"), (False, "none")])
def test_an_older_checkpoint_or_file_says_true_or_false(saved: bool, expected: str) -> None:
    tree = config.to_dict(Config())
    tree["model"]["bn_sync"] = saved
    assert config.from_dict(tree).model.bn_sync == expected
    with pytest.raises(UsageError, match="one of none, group, world"):
        config.parse(["--bn-sync=node"])


def test_the_last_flag_wins() -> None:
    assert config.parse(["--epochs", "5", "epochs=6"]).epochs == 6


def test_a_value_can_go_back_to_the_recipe() -> None:
    assert config.parse(["--epochs", "5", "--epochs", "none"]).epochs is None


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("--batchsize", "--batch-size"),
        ("--optim.base-lrr", "--optim.base-lr"),
        ("--bacbone", "--backbone"),
        ("--dry-rn", "--dry-run"),
        ("--no-verfy", "--verify"),
        ("--lr", "--optim.base-lr"),
        ("optim.bse_lr=1", "--optim.base-lr"),
    ],
)
def test_unknown_flags_suggest_the_nearest(word: str, suggestion: str) -> None:
    message = refused(word, "3")
    assert word.partition("=")[0] in message and f"did you mean {suggestion}?" in message


def test_a_flag_like_nothing_else_points_to_the_help() -> None:
    assert refused("--qqqq", "3") == "unknown flag --qqqq; --help lists all"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epochs", "ten"], ["--epochs", "an integer", "'ten'"]),
        (["--epochs", "2.5"], ["--epochs", "an integer"]),
        (["--base-lr", "fast"], ["--optim.base-lr", "a number"]),
        (["--base-lr", "nan"], ["--optim.base-lr", "above 0", "nan"]),
        (["--base-lr", "inf"], ["--optim.base-lr", "above 0"]),
        (["--verify=maybe"], ["--input.verify", "true or false"]),
        (["--precision", "bf-16"], ["--run.precision", "did you mean bf16?", "fp32"]),
        (["--recipe", "cifar-10"], ["--recipe", "did you mean cifar10?"]),
        (["--seed", "none"], ["--seed", "an integer"]),
        (["--data", "--out", "x"], ["--data needs a value"]),
        (["--epochs"], ["--epochs needs a value", "an integer"]),
        (["--dry-run=true"], ["--dry-run takes no value"]),
        (["--out="], ["--out must name a folder"]),
        (["/images"], ["unexpected '/images'", "--data /images"]),
    ],
)
def test_wrong_values_are_named(argv: list[str], words: list[str]) -> None:
    message = refused(*argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "argv",
    [
        ["--epochs", "0"],
        ["--batch-size", "1"],
        ["--image-size", "7"],
        ["--crop-area-min", "0"],
        ["--crop-area-min", "1.1"],
        ["--accumulate", "0"],
        ["--threads", "0"],
        ["--target-decay", "1.01"],
        ["--weight-decay", "-1e-6"],
        ["--warmup-epochs", "-1"],
        ["--keep", "0"],
        ["--seed", "-1"],
        ["--seed", str(2**63)],
        ["--checkpoint.every", "0"],
        ["--checkpoint.every", "soon"],
        ["--log-every", "0"],
    ],
)
def test_values_out_of_bounds_are_refused(argv: list[str]) -> None:
    assert "must" in refused(*argv)


def test_dataclasses_check_what_python_code_gives_them() -> None:
    with pytest.raises(ValueError, match=r"--optim.base-lr must be above 0, got -1"):
        OptimConfig(base_lr=-1.0)
    with pytest.raises(ValueError, match=r"--epochs must be an integer, got '3'"):
        Config(epochs="3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"--input.accumulate must be an integer, got True"):
        InputConfig(accumulate=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3  # type: ignore[misc]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_is_overridden_by_flags_wherever_they_stand(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.yaml", "epochs: 7\noptim:\n  base-lr: 1e-1\nmodel.stem: cifar\nrun:\n"
    )
    parsed = config.parse(["--epochs", "9", f"--config={file}"])
    assert (parsed.epochs, parsed.optim.base_lr, parsed.model.stem) == (9, 0.1, "cifar")


# each line doubles the one before: forty of them are 10^12 values
LAUGHS = "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40))
MERGES = "".join(f"a{n + 1}: &a{n + 1} {{<<: [*a{n}, *a{n}]}}\n" for n in range(40))


def test_of_two_files_the_later_wins(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "epochs: 7\nseed: 1\n")
    second = write(tmp_path / "b.yaml", "epochs: 8\n")
    parsed = config.parse(["--config", first, "--config", second])
    assert (parsed.epochs, parsed.seed) == (8, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim:\n  base_lrr: 1\n", ["optim.base_lrr", "a.yaml", "did you mean optim.base_lr?"]),
        ("base_lr: 1\n", ["did you mean optim.base_lr?"]),
        ("qqqq: 1\n", ["unknown key qqqq in", "a.yaml"]),
        ("epochs: ten\n", ["epochs in", "a.yaml", "an integer", "'ten'"]),
        ("epochs: 3.5\n", ["an integer", "3.5"]),
        ("epochs: true\n", ["an integer", "True"]),
        ("seed:\n", ["seed in", "cannot be empty"]),
        ("out: 2024\n", ["out in", "quotes"]),
        ("backend: dalli\n", ["did you mean dali?"]),
        ("optim: 3\n", ["optim in", "is a section"]),
        (f"optim:\n  base_lr: 1{'0' * 400}\n", ["optim.base_lr in", "a number"]),
        ("out: 2026-02-30\n", ["a.yaml is not YAML", "day"]),
        ("epochs: !!float x\n", ["a.yaml is not YAML"]),
        ("- epochs\n", ["must hold settings", "list"]),
        ("epochs: [\n", ["a.yaml is not YAML", "line 2"]),
        ("data: *nowhere\n", ["a.yaml is not YAML", "undefined alias"]),
        ("data: &a [*a]\n", ["a.yaml is not YAML", "with its aliases"]),
        ("a0: &a0 [x, x]\n" + LAUGHS, ["a.yaml is not YAML", "with its aliases"]),
        ("a0: &a0 {x: 1}\n" + MERGES, ["a.yaml is not YAML", "with its aliases"]),
        ("data: " + "[" * 1500, ["a.yaml is not YAML"]),
        ("data: !!python/object/apply:os.getcwd []\n", ["a.yaml is not YAML"]),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refused("--config", write(tmp_path / "a.yaml", text))
    assert all(word in message for word in words), message


def test_a_missing_file_is_named_and_an_empty_one_is_no_error(tmp_path: Path) -> None:
    assert "b.yaml cannot be read" in refused("--config", str(tmp_path / "b.yaml"))
    assert config.parse(["--config", write(tmp_path / "c.yaml", "")]) == Config()


def changed(name: str) -> object:
    """Another value than the default, for any flag."""
    flag = FLAGS[name]
    if flag.choices:
        return next(c for c in reversed(flag.choices) if c != flag.default)
    special = {
        "model.method": "simsiam+group-ws",
        "backend": "dali:mixed:0.65",
        "checkpoint.every": "2h",
        "model.hidden_layer": "avgpool",
    }
    by_kind = {bool: not flag.default, int: 12, float: 0.25, str: "other"}
    return special.get(name, by_kind[flag.kinds[0]])


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_survives_command_line_dict_and_yaml(name: str, tmp_path: Path) -> None:
    value = changed(name)
    parsed = config.parse([f"{FLAGS[name].option}={value}"])
    assert config.get(parsed, name) == value != FLAGS[name].default
    assert parsed == config.replace(Config(), {name: value})  # and nothing else has changed
    assert config.from_dict(config.to_dict(parsed)) == parsed
    file = write(tmp_path / "a.yaml", config.to_yaml(parsed))
    assert config.parse(["--config", file]) == parsed


@pytest.mark.parametrize("word", ["dali:", "dali:gpu", "dali:mixed:1.5", "torch:cpu", "", "dalli"])
def test_a_backend_that_does_not_exist(word: str) -> None:
    message = refused("--backend", word)
    assert "auto, torch, dali, ffcv, synthetic" in message
    if word == "dalli":
        assert "did you mean dali" in message


def test_yaml_keeps_the_order_of_definition() -> None:
    tree = yaml.safe_load(config.to_yaml(Config()))
    assert list(tree) == [field.name for field in dataclasses.fields(Config)]
    assert list(tree["optim"]) == [field.name for field in dataclasses.fields(OptimConfig)]


def test_from_dict_takes_defaults_for_missing_and_refuses_unknown_keys() -> None:
    assert config.from_dict({"optim": {"base_lr": 1}}).optim.base_lr == 1.0
    with pytest.raises(UsageError, match=r"unknown key optim.speed in a checkpoint"):
        config.from_dict({"optim": {"speed": 1}}, "a checkpoint")


def test_names_are_few_and_leaf_names_unique() -> None:
    leaves = [name.rpartition(".")[2] for name in FLAGS]
    assert len(set(leaves)) == len(leaves)
    assert not set(leaves) & {"config", "help", "dry_run", "print_config"}
    instead = {action for action, about in config.ACTIONS.items() if about.endswith("and stop")}
    assert len(FLAGS) + len(config.ACTIONS.keys() - {"--help"} - instead) <= 40
    assert all(flag.help for flag in FLAGS.values())


def test_diff_tells_what_a_resumed_run_may_not_change() -> None:
    saved = config.parse(["--epochs", "100", "--threads", "2"])
    now = config.parse(
        ["--epochs", "300", "--threads", "8", "--out", "elsewhere", "--keep", "5", "--base-lr", "1"]
    )
    assert config.diff(saved, now) == ["epochs: 100 → 300", "optim.base_lr: None → 1.0"]
    assert "input.threads: 2 → 8" in config.diff(saved, now, free=True)
    assert config.diff(saved, saved, free=True) == []


def test_what_a_resumed_run_may_change() -> None:
    free = {name for name, flag in FLAGS.items() if flag.free}
    assert free == {
        *("data", "out", "recipe", "backend", "device"),
        *("input.verify", "input.threads", "input.accumulate", "run.engine", "run.max_steps"),
        "model.init",  # of a fresh start; a resumed run keeps its own
        *(name for name in FLAGS if name.startswith(("monitor.", "checkpoint."))),
    }


def test_spec_of_the_paper() -> None:
    spec = config.spec(fill(Config()))
    assert (spec.image_size, spec.views, spec.semantics) == (224, (VIEW1, VIEW2), "deepmind")


def test_spec_follows_the_flags() -> None:
    argv = "--views no-blur-no-flip --crop-area-min 0.2 --semantics torchvision --image-size 32"
    spec = config.spec(fill(config.parse(argv.split())))
    assert (spec.image_size, spec.semantics) == (32, "torchvision")
    for view, original in zip(spec.views, (VIEW1, VIEW2), strict=True):
        assert (view.blur, view.flip, view.crop_area) == (0.0, 0.0, (0.2, 1.0))
        assert view.solarize == original.solarize


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("paper", ("update", False, True)),
        ("lightly", ("sum", False, True)),
        ("mmpretrain", ("sum", True, True)),
        ("sgd", ("update", False, False)),
    ],
)
def test_variants_of_the_optimizer(variant: str, expected: tuple[str, bool, bool]) -> None:
    optim = config.parse(["--optim.variant", variant]).optim
    assert (optim.norm, optim.lr_in_momentum, optim.adapt) == expected


@pytest.mark.parametrize(
    ("every", "steps", "minutes"),
    [("30m", 0, 30.0), ("1.5h", 0, 90.0), ("500", 500, math.inf), (500, 500, math.inf)],
)
def test_checkpoints_go_by_time_or_by_steps(every: int | str, steps: int, minutes: float) -> None:
    checkpoint = CheckpointConfig(every=every)
    assert (checkpoint.every_steps, checkpoint.every_minutes) == (steps, minutes)


@pytest.mark.parametrize(
    ("tracker", "expected"),
    [
        ("tensorboard", (True, False)),
        ("wandb", (False, True)),
        ("both", (True, True)),
        ("none", (False, False)),
    ],
)
def test_trackers(tracker: str, expected: tuple[bool, bool]) -> None:
    monitor = config.parse(["--tracker", tracker]).monitor
    assert (monitor.tensorboard, monitor.wandb) == expected


def test_parts_are_said_before_the_path() -> None:
    for data, path, in_parts in (
        ("parts:/local/train.beton", "/local/train.beton", True),
        ("/local/train.beton", "/local/train.beton", False),
        ("/data/parts:1", "/data/parts:1", False),
        ("parts:synthetic:8", "synthetic:8", True),
    ):
        given = config.parse(["--data", data])
        assert (given.data_path, given.in_parts) == (path, in_parts)


def test_out_may_be_below_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--out=~/run` comes as it stands from a shell; a folder named ~ is dangerous to remove."""
    monkeypatch.setenv("HOME", "/home/somebody")
    assert config.parse(["--out=~/runs/byol"]).out == "/home/somebody/runs/byol"
    assert config.parse(["--out=runs/~x"]).out == "runs/~x"
