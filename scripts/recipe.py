"""The recipe for training neural networks, end to end: `accelerate launch scripts/recipe.py`.

Without arguments it runs on bundled real data. ``--help`` lists the flags; every flag of
`TrainingArguments` is one of them.
"""

import os
import sys
from pathlib import Path

# Threads that spin while they wait make a shared machine crawl; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_recipe.runner.main import main

if __name__ == "__main__":
    sys.exit(main())
