#!/usr/bin/env python3
"""Fuzz one target with atheris, which looks at the branches that each input takes: ``make fuzz SECONDS=60``.

    fuzz.py TARGET --seconds N [--corpus FOLDER]

The corpus is kept, so that the next run goes on where this one ended.  An input that
breaks a promise ends the run with its trace, and is written to ``crash-…`` in the
corpus' folder; the same is shown by ``fuzz.py TARGET --again FILE``.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

LONGEST = 8_192
"""Bytes of an input: what goes wrong with more goes wrong with these, and a run tries more of them."""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("target", choices=("frames", "commands", "tokens", "rest"))
parser.add_argument("--seconds", type=int, default=60)
parser.add_argument("--corpus", type=Path, default=ROOT / "build" / "fuzz")
parser.add_argument("--again", type=Path, help="run this input only")
arguments = parser.parse_args()

if arguments.again is None:
    import atheris  # type: ignore[import-untyped]

    with atheris.instrument_imports(include=["server", "handlers"]):
        from targets import TARGETS
else:
    from targets import TARGETS

target = TARGETS[arguments.target]
if arguments.again is not None:
    target.run(arguments.again.read_bytes())
    sys.exit(0)
folder = arguments.corpus / arguments.target
folder.mkdir(parents=True, exist_ok=True)
for number, seed in enumerate(target.seeds):
    (folder / f"seed-{number}").write_bytes(seed)
options = [f"-max_total_time={arguments.seconds}", f"-max_len={LONGEST}", f"-artifact_prefix={folder}/", "-timeout=5"]
atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", str(folder)], target.run)
atheris.Fuzz()
