"""`python -m fewstep_worlds.stickers`: `fewstep world stickers`."""

import sys

from fewstep.commands.app import main

if __name__ == "__main__":
    main(["world", "stickers", *sys.argv[1:]])
