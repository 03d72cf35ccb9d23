"""compute-sanitizer finds nothing in one launch of every kind of kernel."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).with_name("memcheck.py")


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer on PATH")
def test_memcheck_is_clean():
    plain = [sys.executable, str(SCRIPT)]
    subprocess.run(plain, check=True, timeout=300)  # compiles
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1"]
    done = subprocess.run([*sanitizer, *plain], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
