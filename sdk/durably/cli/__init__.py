"""The command ``durably``."""


def main() -> None:
    """Runs the command line."""
    from durably.cli.app import app  # the entry point is imported by tools that only look for it

    app()
