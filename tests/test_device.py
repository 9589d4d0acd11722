"""The tests of tests/second_device.py, in a process of their own: a backend that torch
has once been told of changes what every later test draws and checkpoints.
"""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).with_name("second_device.py")


def test_on_a_second_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
