"""What is typed after `python -m sparc3`: one module per word, and `stage` for all stages. Imports
every room below."""
