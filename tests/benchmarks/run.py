"""Every benchmark, one after the other: `make bench`, or `python tests/benchmarks/run.py NAME...` for some."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(names: list[str]) -> None:
    sys.path.insert(0, str(HERE))
    for name in names or sorted(path.stem for path in HERE.glob("bench_*.py")):
        module = importlib.import_module(name)
        print(f"\n{name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        module.main()


if __name__ == "__main__":
    main(sys.argv[1:])
