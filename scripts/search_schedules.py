"""`ts-adapt search` as a script: python scripts/search_schedules.py --config configs/fashion.yml"""

import sys

from ts_adapt.cli import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
