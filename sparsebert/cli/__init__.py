"""The ``sparsebert`` program. Importing this loads no command: each loads what it needs when it runs."""

from __future__ import annotations


def main() -> None:
    """Runs the program on ``sys.argv`` and exits: 0 done, 1 an error, 2 a usage mistake, 130 interrupted."""
    from sparsebert.cli.app import app

    app(prog_name="sparsebert")
