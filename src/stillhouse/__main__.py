"""``python -m stillhouse``: the command line, also for launchers that start modules (``torchrun -m stillhouse``)."""

from stillhouse.cli import main

if __name__ == "__main__":
    main()
