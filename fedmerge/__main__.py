"""The command ``fedmerge``, also as ``python -m fedmerge``, whatever packages the current directory has."""

from fedmerge.beside import beside


def main() -> None:
    """Run the command line."""
    beside("experiments.cli:main")()


if __name__ == "__main__":
    main()
