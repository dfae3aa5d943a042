"""The panel on a terminal, plain lines elsewhere, and a terminal left as it was found."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from byol_fast.watching import live

ROOT = Path(live.__file__).parents[1]
VALUES = {
    "loss": 1.25,
    "lr": 0.1,
    "target_decay": 0.996,
    "time/images_per_second": 1234.5,
    "time/data_wait_share": 0.021,
    "knn_accuracy": 0.456,
}


def test_time_left_follows_the_recent_pace():
    now = [0.0]
    eta = live.Eta(100, window=3, clock=lambda: now[0])
    assert eta.update(0) is None
    now[0] = 10.0
    assert eta.update(10) == pytest.approx(90.0)
    assert eta.update(10) == pytest.approx(90.0)  # an evaluation at the same step
    now[0] = 30.0
    eta.update(20)
    now[0] = 50.0
    assert eta.update(30) == pytest.approx(70 * 2)  # the first, faster steps are forgotten
    now[0] = 60.0
    assert eta.update(100) == 0.0


def test_a_stream_that_is_no_terminal_gets_one_line_per_log_point():
    stream = io.StringIO()
    display = live.open_display(200, stream=stream)
    assert isinstance(display, live.Lines)
    display.log(50, VALUES)
    display.event(50, "alarm", "spread is low")
    display.log(100, {"loss": None})
    display.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    expected = "step 50/200 (25.0 %)  loss 1.25  lr 0.1  tau 0.996  images/s 1,234  wait 2.1 %"
    assert lines[0] == expected + "  kNN 45.6 %"
    assert lines[1] == "[alarm] step 50: spread is low"
    assert "loss not finite" in lines[2] and "  left 0:" in lines[2]


def test_plain_lines_survive_a_stream_that_knows_only_ascii():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    live.Lines(10, stream).event(1, "alarm", "1/√256")
    assert raw.getvalue() == b"[alarm] step 1: 1/?256\n"


def test_panel_can_be_switched_off_and_nothing_else_is_accepted():
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    assert isinstance(live.open_display(1, panel="off", stream=Terminal()), live.Lines)
    with pytest.raises(ValueError, match="auto or off"):
        live.open_display(1, panel="maybe")


def test_sparkline_spans_lowest_to_highest():
    assert live.sparkline([0.0, 3.5, 7.0]) == "▁▅█"
    assert live.sparkline([1.0, float("nan"), 1.0]) == "▁ ▁"
    assert live.sparkline([float("inf")]) == ""


def on_terminal(code: str, *, env: dict[str, str] | None = None) -> tuple[str, int]:
    """Run `code` with a terminal of 100 columns as stdout and stderr; what it wrote, exit code."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals need a POSIX system")
    main, side = pty.openpty()
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    plain |= {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "PYTHONUTF8": "1"}
    process = subprocess.Popen(
        # As ASCII: an argument is decoded by the locale, which may know no more.
        [sys.executable, "-c", f"exec({textwrap.dedent(code)!a})"],
        stdin=side,
        stdout=side,
        stderr=side,
        cwd=ROOT,
        env=plain | (env or {}),
    )
    os.close(side)
    out = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        out += part
    os.close(main)
    return out.decode(), process.wait()


RUN = """
import logging, sys
from byol_fast.watching import live
logging.basicConfig(format="LOG %(message)s")
display = live.open_display(100, panel="auto", title="byol_fast · 2 ranks")
print("DISPLAY", type(display).__name__)
values = {"loss": 1.5, "lr": 0.1, "time/images_per_second": 999.0, "epoch": 3.0}
for step in (10, 20):
    display.log(step, values)
logging.warning("said by a logger")
display.event(20, "alarm", "the spread is low")
display.log(30, values)
"""


def test_a_terminal_gets_a_panel_and_its_cursor_back():
    text, code = on_terminal(RUN + 'display.close()\nprint("AFTER")\n')
    assert code == 0 and "DISPLAY Panel" in text
    assert "2 ranks" in text and "step 30 of 100" in text and "999" in text
    said = text.index("LOG said by a logger")
    assert text.rindex("\x1b[2K", 0, said) > text.rindex("╯", 0, said)  # the panel made room
    assert text.count("the spread is low") >= 2  # above the panel, and in it
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # hidden while drawn, shown again
    assert text.rstrip().endswith("AFTER")


@pytest.mark.parametrize("end", ['raise RuntimeError("boom")', "pass"])
def test_a_run_that_does_not_close_leaves_terminal_and_traceback_whole(end: str):
    text, code = on_terminal(RUN + end)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    if "raise" in end:
        assert code == 1
        tail = text[text.rindex("Traceback (most recent call last):") :]
        assert "╭" not in tail and "│" not in tail and "\x1b[" not in tail.replace("\x1b[?25h", "")
        assert tail.rstrip().endswith("RuntimeError: boom")


@pytest.mark.parametrize(
    "env", [{"TERM": "dumb"}, {"PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}]
)
def test_a_poor_terminal_gets_lines(env: dict[str, str]):
    text, code = on_terminal(RUN + "display.close()", env=env)
    assert code == 0 and "DISPLAY Lines" in text and "\x1b" not in text
    assert "step 30/100 (30.0 %)" in text


def test_errors_sent_to_a_file_stay_in_the_file(tmp_path: Path):
    code = f"""
    import sys
    sys.stderr = open({str(tmp_path / "errors")!r}, "w")
    from byol_fast.watching import live
    display = live.open_display(10)
    display.log(1, {{"loss": 1.0}})
    print("to the file", file=sys.stderr)
    display.close()
    """
    text, _ = on_terminal(code)
    assert "to the file" not in text and "step 1 of 10" in text
    assert (tmp_path / "errors").read_text() == "to the file\n"
