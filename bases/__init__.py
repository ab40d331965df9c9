"""How `polytask-base`, the embedded decoder, is made from scratch: one script per step. See README.md."""
