"""``cppo`` and ``python -m cppo``: the command line, or one line about what it needs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; say how to install it where the package came without an extra."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"cppo: the command line needs {error.name}: pip install 'cppo[train]' (beside verl: 'cppo[verl]')\n"
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
