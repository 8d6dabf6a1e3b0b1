"""``python -m reweigh.benchmarks``."""

import sys

if __name__ == "__main__":
    try:
        from .cli import main
    except ModuleNotFoundError as error:
        sys.exit(f"reweigh.benchmarks needs {error.name}: pip install 'reweigh[bench]'")
    sys.exit(main())
