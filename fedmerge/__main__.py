"""``python -m fedmerge`` is the command ``fedmerge``: the only line of the library that knows of the packages above."""

if __name__ == "__main__":
    from experiments.cli import main

    main()
