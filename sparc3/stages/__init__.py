"""The pipeline: one module per stage, run() and glue. Imports every room below."""
