"""`ts-adapt teach` as a script: python scripts/generate_teacher.py --config configs/fashion.yml"""

import sys

from ts_adapt.cli import main

if __name__ == "__main__":
    sys.exit(main(["teach", *sys.argv[1:]]))
