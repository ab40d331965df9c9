"""Paper claims at laptop scale: one file per paper, honest either way. `python -m claims` prints one line for each."""
