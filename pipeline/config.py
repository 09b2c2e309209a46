"""The flags of every job: one frozen dataclass per job, checked where it is made.

`parse` turns a dataclass into a command line: field docstrings are the help texts, a `ConfigError`
raised in `__post_init__` is printed as one line with exit code 2.
"""

import sys
from collections.abc import Sequence
from typing import TypeVar

Config = TypeVar("Config")


def parse(config: type[Config], *, description: str, args: Sequence[str] | None = None) -> Config:
    """Parse command-line flags into `config`; exits with code 2 and one line where a flag is wrong."""
    import tyro  # only jobs need it

    return tyro.cli(config, description=description, args=sys.argv[1:] if args is None else args)
