"""``python -m sparsebert`` is the ``sparsebert`` program."""

from sparsebert.cli import main

if __name__ == "__main__":
    main()
