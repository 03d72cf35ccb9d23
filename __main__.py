"""``python -m gossamer`` is the command line ``gossamer``."""

import sys

from .frontend.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
