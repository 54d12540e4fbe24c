"""Importing it, before any library that has caches, begins the guard for a session of tests."""

import os
import tempfile
from pathlib import Path

import guard

FOLDER = Path(tempfile.mkdtemp(prefix="ts_adapt-tests-"))
guard.begin(FOLDER, os.environ)
guard.watch()
