"""What is typed after `python -m sparc3` and is no stage: one module per word. Imports every room
below."""
