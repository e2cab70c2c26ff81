"""Exit codes and messages of the command as a whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

from numagraft.cli.main import COMMANDS, exit_code
from numagraft.errors import CheckpointError, PlacementError, RuleError


def numagraft(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "numagraft", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [(PlacementError("x"), 1), (MemoryError("x"), 1), (RuleError("x"), 2), (CheckpointError("x"), 2)],
)
def test_exit_code(error, code):
    assert exit_code(error) == code


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    shown = numagraft(command, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "Usage" in shown.stdout


def test_an_unknown_option_is_bad_usage():
    shown = numagraft("run", "--no-such-option")
    assert shown.returncode == 2
    assert "Traceback" not in shown.stderr


def test_a_missing_model_is_one_paragraph(tmp_path):
    shown = numagraft("run", str(tmp_path / "nowhere"), "--prompt", "hello")
    assert shown.returncode == 2
    assert "Traceback" not in shown.stderr
    assert "nowhere" in shown.stderr


def test_an_empty_prompt_is_refused_before_anything_is_read(tmp_path):
    shown = numagraft("run", str(tmp_path), "--prompt", "  ")
    assert shown.returncode == 2
    assert "prompt is empty" in shown.stderr


def test_help_is_quick_because_torch_stays_out():
    code = (
        "import sys; sys.argv = ['numagraft', '--help']\n"
        "from numagraft.cli import main\n"
        "try: main.run()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip().splitlines()[-1] == "False"
