"""``python -m stillhouse.cli``, for launchers that start modules (torchrun -m)."""

from stillhouse.cli import main

if __name__ == "__main__":
    main()
