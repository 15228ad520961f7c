"""`python -m bnfuse`: the command line."""

import sys

from bnfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
