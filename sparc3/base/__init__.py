"""What every room stands on: errors, files, params, products, processes and tracking. Imports
nothing of sparc3."""
