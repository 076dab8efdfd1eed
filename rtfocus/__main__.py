"""Run the command line with ``python -m rtfocus``."""

from rtfocus.cli import main

if __name__ == "__main__":
    main()
