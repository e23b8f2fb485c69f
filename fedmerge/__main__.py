"""The command ``fedmerge``, also as ``python -m fedmerge``."""

from fedmerge.beside import beside


def main() -> None:
    """Run the command line, also where other projects have packages of its packages' names."""
    beside("experiments.cli:main")()


if __name__ == "__main__":
    main()
