"""Speed as paired ratios: the same work, in turns, in one process, against what a user would pick instead."""
