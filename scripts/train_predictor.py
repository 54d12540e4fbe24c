"""`ts-adapt train` as a script: python scripts/train_predictor.py --config configs/fashion.yml"""

import sys

from ts_adapt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
