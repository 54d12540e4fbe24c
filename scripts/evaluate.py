"""`ts-adapt evaluate` as a script: python scripts/evaluate.py --config configs/fashion.yml"""

import sys

from ts_adapt.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
