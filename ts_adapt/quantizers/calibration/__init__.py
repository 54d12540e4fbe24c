"""Calibration sets, what layers receive on them, and the ranges that follow."""
