"""`python -m llmslm`, for launchers that start a module, as torchrun does."""

from llmslm.cli import main

if __name__ == "__main__":
    main()
