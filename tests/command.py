"""`llmslm` under torchrun; notes the process's id, for tests that kill it."""

import os
from pathlib import Path

if __name__ == "__main__":
    with Path("pids").open("a") as file:
        file.write(f"{os.getpid()} ")
    from llmslm.cli import main

    main()
