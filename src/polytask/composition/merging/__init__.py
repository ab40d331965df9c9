"""Merging rules: several differences of one matrix become one, without data and without training. One file each."""
