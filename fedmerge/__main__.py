"""``python -m fedmerge`` is the command ``fedmerge``, whatever packages the current directory has."""

if __name__ == "__main__":
    from fedmerge.beside import beside

    beside("experiments.cli:main")()
