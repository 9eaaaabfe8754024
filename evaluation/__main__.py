"""`python -m evaluation`, for launchers that start a module, as torchrun does."""

from evaluation.cli import main

if __name__ == "__main__":
    main()
