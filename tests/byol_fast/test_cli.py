"""The command line: help, printed settings, exit codes, dispatch, and that it stays light."""

import io
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from byol_fast import cli, pretrain
from byol_fast._version import __version__
from byol_fast.config import ACTIONS, FLAGS, parse
from byol_fast.errors import Exit
from byol_fast.recipes import RECIPES, fill


def test_help_lists_every_flag_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.pretrain_arguments(["--help", "--epochs", "x"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {flag.option}" in text for flag in FLAGS.values())
    assert all(action in text for action in ACTIONS)
    assert "Optimizer and schedule:" in text and "\nbyol" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_cuts_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    """The recipes were listed as `imagenet10` at the end of a line and `0` on the next one."""
    cli.pretrain_arguments(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for flag in FLAGS.values():
        for choice in flag.choices:
            assert re.search(rf"(?<![\w-]){re.escape(choice)}(?![\w-])", text), choice
    entry = text[text.index("  --recipe ") : text.index("  --epochs ")]
    recipes = "".join(entry.split()).partition("[")[2].partition(";")[0]
    assert recipes == "|".join(FLAGS["recipe"].choices)


@pytest.mark.parametrize(
    "call",
    [
        "from byol_fast import cli; code = cli.pretrain_arguments(['--help'])",
        "from byol_fast import cli; code = cli.main(['pretrain', '--help'])",
        "from byol_fast import pretrain; code = pretrain.main(['--print-config'])",
    ],
)
def test_help_and_settings_do_not_import_torch(call: str) -> None:
    check = f"import sys; {call}; print(code, [m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("recipe", RECIPES)
def test_printed_settings_are_a_fixed_point(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--recipe", recipe, "--epochs", "123", "--print-config", "--weight-decay", "1e-7"]
    assert cli.pretrain_arguments(argv) == 0
    first = capsys.readouterr().out
    assert yaml.safe_load(first)["optim"]["weight_decay"] == 1e-7
    file = tmp_path / "a.yaml"
    file.write_text(first, encoding="utf-8")
    assert cli.pretrain_arguments(["--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == first
    assert parse(["--config", str(file)]) == fill(parse([w for w in argv if w != "--print-config"]))


def test_a_good_command_line_is_a_call() -> None:
    call = cli.pretrain_arguments(["--data", "images", "--dry-run", "--epochs", "3"])
    assert isinstance(call, cli.PretrainCall)
    assert call.dry_run and call.config.epochs == 3 and call.config.batch_size is None
    call = cli.pretrain_arguments(["--data", "images"])
    assert isinstance(call, cli.PretrainCall) and not call.dry_run


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "x", "--epoch", "3"], "did you mean --epochs?"),
        ([], "add --data FOLDER"),
        (["--data", "x", "--epochs", "x"], "--epochs must be an integer"),
        (["--replay", f"epoch={'9' * 5000},index=1"], "--replay needs a row"),
    ],
)
def test_mistakes_exit_with_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.pretrain_arguments(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and words in captured.err and not captured.out


def test_only_rank_0_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.pretrain_arguments(["--nonsense"]) == 2
    assert cli.pretrain_arguments(["--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_commands_get_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 4

    for module, _ in cli.COMMANDS.values():
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(main=main))
    for command in cli.COMMANDS:
        assert cli.main([command, "--data", command, "--help"]) == 4
    assert seen == [["--data", command, "--help"] for command in cli.COMMANDS]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_exists(command: str) -> None:
    root = Path(__file__).parents[2]
    path = root / (cli.COMMANDS[command][0].replace(".", "/") + ".py")
    assert "def main(" in path.read_text(encoding="utf-8")


def test_unknown_commands_exit_with_2_and_suggest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrian"]) == 2
    assert "did you mean pretrain?" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: byol-fast")


def test_version_and_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"byol-fast {__version__}\n"
    assert cli.main(["--help"]) == 0
    assert all(command in capsys.readouterr().out for command in ["pretrain"])


def test_an_exit_code_does_not_need_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """`… 2>&1 | head -1` has ended before the error is told."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    assert pretrain._failed(Exit.DATA, ValueError("no images")) == 4
