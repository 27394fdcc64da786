"""Start one rank: tie its life to the launcher's, then become the program. Run by runtime/launch.py as `python -I rank.py PROGRAM`.

Imports nothing of this project: a rank that is not yet the program should start in milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)     # the kernel kills this process when the launcher ends; exec keeps it
if os.environ["LAUNCHER_PID"] != str(os.getppid()):
    sys.exit(1)                                                   # the launcher ended before the line above
if os.environ["WORLD_SIZE"] == "1":                               # a single process must not create a process group or use DDP
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
