"""On PYTHONPATH of a test's processes: an image that holds POISON kills the process that decodes it."""

import os
import signal

from PIL import Image

_open = Image.open


def deadly_open(file, *args, **kwargs):
    if b"POISON" in file.getvalue():
        os.kill(os.getpid(), signal.SIGKILL)
    return _open(file, *args, **kwargs)


Image.open = deadly_open
