"""On PYTHONPATH of a test's processes: an image that holds POISON kills the process that decodes it.

One that holds STUCK keeps it busy for an hour.
"""

import os
import signal
import time

from PIL import Image

_open = Image.open


def deadly_open(file, *args, **kwargs):
    if b"POISON" in file.getvalue():
        os.kill(os.getpid(), signal.SIGKILL)
    if b"STUCK" in file.getvalue():
        time.sleep(3600)
    return _open(file, *args, **kwargs)


Image.open = deadly_open
