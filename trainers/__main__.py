"""`accelerate launch -m customize.trainers METHOD [FILE.yaml] [--flag value ...]`: the trainer that
`customize train` runs."""

import sys

from customize.errors import run_safely
from customize.trainers.launch import train_command

if __name__ == "__main__":
    raise SystemExit(run_safely(train_command, sys.argv[1:]))
