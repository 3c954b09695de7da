"""The command line, saying on standard error after which prompt it is: for tests that kill it there."""

import sys

import ingest.cli
from atlas.cli import main


class Telling(ingest.cli._Display):
    """The display of a pipe, with one more line a prompt."""

    def update(self, summary):
        super().update(summary)
        print("progress", summary.prompts, file=sys.stderr, flush=True)


if __name__ == "__main__":
    ingest.cli._Display = Telling
    main()
