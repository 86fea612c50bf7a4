"""The pipeline: one module per stage, run() and glue, and the table of them. Imports every room
below."""
