"""Start one rank: let it end with the launcher, then become the program.

Run by runtime/launch.py as `python -I rank.py PROGRAM [arguments]`. Imports nothing that takes time.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if sys.platform == "linux":  # the kernel kills this process when the launcher ends; exec keeps the setting
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.environ["LAUNCHER_PID"] != str(os.getppid()):  # the launcher ended before that
    sys.exit(1)
if os.environ["WORLD_SIZE"] == "1":  # a single process must not create a process group or use DDP
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
